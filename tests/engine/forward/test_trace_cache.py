"""A kept trace gives what the modules give, for each model of its kind; or it is made anew."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from transformers import PreTrainedModel

from infuse.server.engine.native.forward import trace_cache, tracing
from infuse.server.engine.native.forward.execution import processor_of
from infuse.server.engine.native.forward.trace_cache import find_or_trace, key_of, sources
from infuse.server.engine.native.forward.tracing import NotTraced
from infuse.server.engine.native.kernels.linear import Pack
from tests.engine.forward.test_tracing import FLAT, assert_equal, prepared
from tests.factories import tiny_model


@contextmanager
def no_trace() -> Iterator[None]:
    with patch.object(tracing, "make_fx", side_effect=AssertionError("it is traced")):
        yield


def kept(folder: Path, base: PreTrainedModel, pack: bool = False) -> Path:
    """Traces, and says where that is kept."""
    ia3, context, modules = prepared(base, pack)
    find_or_trace(ia3, context, modules, folder)
    [file] = folder.iterdir()
    return file


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FLAT)
def test_a_later_start_does_not_trace_and_gives_the_same_to_the_bit(
    family: str, pack: bool, tmp_path: Path
) -> None:
    kept(tmp_path, tiny_model(family), pack)
    ia3, context, modules = prepared(tiny_model(family), pack)

    with no_trace():
        found = find_or_trace(ia3, context, modules, tmp_path)

    assert_equal(context, found, modules)


def test_a_trace_has_no_weights_so_that_a_model_of_the_same_kind_has_its_own(
    tmp_path: Path,
) -> None:
    kept(tmp_path, tiny_model("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.25)
    ia3, context, modules = prepared(other, pack=False)

    with no_trace():
        found = find_or_trace(ia3, context, modules, tmp_path)

    assert_equal(context, found, modules)


def test_layers_that_are_packed_otherwise_have_another_trace(tmp_path: Path, kernel: Pack) -> None:
    for pack, ours in ((False, None), (True, None), (True, kernel)):
        ia3, context, modules = prepared(tiny_model("llama"), pack, ours)
        assert_equal(context, find_or_trace(ia3, context, modules, tmp_path), modules)

    assert len(list(tmp_path.iterdir())) >= 2


@pytest.mark.parametrize("content", [b"", b"damaged", None])
def test_what_is_damaged_or_of_another_model_is_made_anew(
    content: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = kept(tmp_path / "llama", tiny_model("llama"))
    whole = file.read_bytes()
    if content is None:
        shutil.copy(kept(tmp_path / "gpt2", tiny_model("gpt2")), file)
    else:
        file.write_bytes(content)
    ia3, context, modules = prepared(tiny_model("llama"), pack=False)

    with caplog.at_level(logging.WARNING, "infuse.server.engine.native.forward.trace_cache"):
        found = find_or_trace(ia3, context, modules, tmp_path / "llama")

    assert_equal(context, found, modules)
    assert "is traced again" in caplog.text
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_keeps_no_start_from_tracing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ia3, context, modules = prepared(tiny_model("llama"), pack=False)

    assert_equal(
        context, find_or_trace(ia3, context, modules, tmp_path / "file" / "within"), modules
    )


def test_a_model_with_hooks_finds_no_trace_either(tmp_path: Path) -> None:
    """It has the same modules as one without."""
    kept(tmp_path, tiny_model("llama"))
    base = tiny_model("llama")
    base.register_forward_hook(lambda *_: None)
    ia3, context, modules = prepared(base, pack=False)

    with pytest.raises(NotTraced, match="hooks"):
        find_or_trace(ia3, context, modules, tmp_path)


def test_what_is_kept_depends_on_all_code_of_the_engine_and_of_the_adapters() -> None:
    root = Path(__file__).parents[3]
    rooms = (root / "infuse" / "adapters", root / "infuse" / "server" / "engine")
    code = {file for room in rooms for end in ("py", "cpp", "h") for file in room.rglob(f"*.{end}")}

    assert set(sources()) == code


def test_other_code_finds_nothing_of_what_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model("llama")
    files = [tmp_path / "layer.py", tmp_path / "kernel.cpp"]
    for file in files:
        file.write_text("1\n")
    monkeypatch.setattr(trace_cache, "sources", lambda: files)
    keys = [key_of(base), key_of(base)]
    for file in files:
        file.write_text("2\n")
        keys.append(key_of(base))

    assert len(set(keys)) == 3


def test_what_was_compared_on_one_gpu_is_not_known_of_another_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {0: "NVIDIA L4", 1: "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: kinds[device.index])

    found = [processor_of(torch.device("cuda", index)) for index in kinds]
    assert found == list(kinds.values())
    assert processor_of(torch.device("cpu")) not in found
