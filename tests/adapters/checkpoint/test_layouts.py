"""A file with the layout of an earlier one is read in one pass, with the same result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import infuse.adapters.checkpoint.layouts as layouts_module
from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    Checkpoint,
    effective_vectors,
    read_checkpoint,
)
from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.checkpoint.layouts import Layouts
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import InvalidAdapter
from tests.adapters.kinds import KINDS
from tests.factories import save_adapter, tiny_llama

MODULES = BaseModules.of(tiny_llama())
DOWN = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def usual_reads(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """Records the files that were checked in the usual way, tensor by tensor."""
    checked: list[Checkpoint] = []

    def noting(checkpoint: Checkpoint, modules: BaseModules) -> AdapterVectors:
        checked.append(checkpoint)
        return effective_vectors(checkpoint, modules)

    monkeypatch.setattr(layouts_module, "effective_vectors", noting)
    return checked


@pytest.fixture
def layouts() -> Layouts:
    return Layouts(MODULES)


def saved(root: Path, count: int = 2, **config: Any) -> list[Path]:
    base = tiny_llama()
    return [save_adapter(base, root / str(seed), seed=seed, **config) for seed in range(count)]


def usually(folder: Path) -> AdapterVectors:
    return effective_vectors(read_checkpoint(folder), MODULES)


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}


def change(folder: Path, to: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    to(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def assert_same(found: AdapterVectors, wanted: AdapterVectors) -> None:
    assert found.digest == wanted.digest
    assert found.vectors.keys() == wanted.vectors.keys()
    assert all(found.vectors[each].equal(wanted.vectors[each]) for each in wanted.vectors)
    assert found.saved.keys() == wanted.saved.keys()
    assert found.nbytes == wanted.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_first_are_read_in_one_pass(
    tmp_path: Path, layouts: Layouts, usual_reads: list[Checkpoint], kind: str
) -> None:
    folders = saved(tmp_path, 4, **KINDS[kind])

    found = [layouts.read(files_of(folder)) for folder in folders]

    assert len(usual_reads) == 1
    for folder, vectors in zip(folders, found, strict=True):
        assert_same(vectors, usually(folder))


def test_each_layout_is_learnt(
    tmp_path: Path, layouts: Layouts, usual_reads: list[Checkpoint]
) -> None:
    folders = [f for kind in KINDS for f in saved(tmp_path / kind, **KINDS[kind])]
    for folder in folders * 2:
        assert_same(layouts.read(files_of(folder)), usually(folder))
    assert len(usual_reads) == len(KINDS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_in_the_usual_words(
    tmp_path: Path, layouts: Layouts, value: float
) -> None:
    good, bad = saved(tmp_path)
    layouts.read(files_of(good))
    change(bad, lambda tensors: tensors[DOWN].fill_(value))

    with pytest.raises(InvalidAdapter) as found:
        layouts.read(files_of(bad))
    with pytest.raises(InvalidAdapter) as usual:
        usually(bad)

    assert found.value.faults == usual.value.faults


def test_large_values_whose_sum_is_infinite_are_read(tmp_path: Path, layouts: Layouts) -> None:
    good, large = saved(tmp_path)
    layouts.read(files_of(good))
    change(large, lambda tensors: tensors[DOWN].fill_(3e38))
    assert_same(layouts.read(files_of(large)), usually(large))


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_cut_is_refused(tmp_path: Path, layouts: Layouts, file: str) -> None:
    good, bad = saved(tmp_path)
    layouts.read(files_of(good))
    data = (bad / file).read_bytes()
    (bad / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidAdapter):
        layouts.read(files_of(bad))


def test_the_same_tensors_under_another_config_are_another_layout(
    tmp_path: Path, layouts: Layouts
) -> None:
    good, other = saved(tmp_path)
    layouts.read(files_of(good))
    config = json.loads((other / CONFIG_FILE).read_bytes())
    (other / CONFIG_FILE).write_text(json.dumps(config | {"feedforward_modules": []}))
    with pytest.raises(InvalidAdapter):
        layouts.read(files_of(other))


def test_a_tensor_too_many_is_refused_after_one_without(tmp_path: Path, layouts: Layouts) -> None:
    good, other = saved(tmp_path)
    layouts.read(files_of(good))
    change(other, lambda tensors: tensors.update(stranger=torch.ones(1)))
    with pytest.raises(InvalidAdapter, match="stranger"):
        layouts.read(files_of(other))


def test_other_dtypes_and_whole_modules_are_always_read_in_the_usual_way(
    tmp_path: Path, layouts: Layouts, usual_reads: list[Checkpoint]
) -> None:
    [half] = saved(tmp_path / "half", 1)
    change(half, lambda tensors: tensors.update({k: t.half() for k, t in tensors.items()}))
    [whole] = saved(tmp_path / "whole", 1, modules_to_save=["lm_head"])
    for folder in (half, whole) * 2:
        assert_same(layouts.read(files_of(folder)), usually(folder))
    assert len(usual_reads) == 4


def test_a_copy_of_an_adapter_has_its_digest(tmp_path: Path, layouts: Layouts) -> None:
    [first] = saved(tmp_path, 1)
    copy = shutil.copytree(first, tmp_path / "copy")
    assert layouts.read(files_of(first)).digest == layouts.read(files_of(copy)).digest
