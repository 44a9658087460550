"""Compiled pieces give what operators give, whatever adapters come; what fails stays as it is."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.graph import GraphLowering
from torch._ops import OpOverload
from transformers import PreTrainedModel

from infuse.server.engine.native.forward import compiling, tracing
from infuse.server.engine.native.forward.tracing import check_alike
from infuse.server.engine.native.kernels.attention import AttentionKernel
from infuse.server.engine.native.kernels.linear import KernelLinear
from infuse.server.engine.native.model.packing import panel_width_of
from tests.engine.harness import Harness, Oracle
from tests.factories import save_adapter, save_tiny_model, tiny_model

PROMPT = [5, 9, 14, 6, 5, 9]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    return tmp_path / "compiled"


def ask_all(engine: Harness, adapters: dict[str, Path]) -> None:
    with engine.held():
        for name in adapters:
            engine.submit(name, PROMPT, name, max_tokens=8)
        engine.submit("base", PROMPT, max_tokens=8)
    engine.wait()


def check_all(engine: Harness, model: PreTrainedModel, adapters: dict[str, Path]) -> None:
    for name, folder in {**adapters, "base": None}.items():
        wanted = Oracle(model, folder).greedy(PROMPT, 8)
        assert engine.answers[name].tokens == wanted, name
    engine.assert_idle()


@pytest.mark.parametrize("fastest", ["onednn", "kernel"])
def test_compiled_blocks_equal_peft_for_every_kind_of_adapter(
    start: Callable[..., Harness],
    llama: PreTrainedModel,
    adapters: dict[str, Path],
    cache: Path,
    prefer: Callable[[str], None],
    fastest: str,
) -> None:
    prefer(fastest)
    engine = start(compile_cache=cache, prefill_chunk_tokens=4)

    assert engine.engine.stats().compiled
    assert (panel_width_of(engine.ia3.base) is None) == (fastest == "onednn")
    ask_all(engine, adapters)
    check_all(engine, llama, adapters)


@pytest.mark.usefixtures("only_kernels")
def test_a_compiled_step_calls_its_kernels_without_python(
    start: Callable[..., Harness],
    llama: PreTrainedModel,
    adapters: dict[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start(compile_cache=cache)
    one = dict(list(adapters.items())[:1])
    monkeypatch.setattr(KernelLinear, "__call__", Mock(side_effect=AssertionError))
    monkeypatch.setattr(AttentionKernel, "__call__", Mock(side_effect=AssertionError))
    call = OpOverload.__call__

    def not_ours(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
        assert operator.namespace != "infuse", operator
        return call(operator, *args, **kwargs)

    monkeypatch.setattr(OpOverload, "__call__", not_ours)

    ask_all(engine, one)
    check_all(engine, llama, one)


def test_adapters_may_bring_modules_of_a_compiled_block(
    start: Callable[..., Harness], tmp_path: Path, cache: Path
) -> None:
    model = tiny_model("llama")
    targets = {"target_modules": ["v_proj"], "feedforward_modules": []}
    brings = {
        "plain": save_adapter(model, tmp_path / "plain", seed=1, **targets),
        "linear": save_adapter(
            model, tmp_path / "linear", seed=2, modules_to_save=["k_proj"], **targets
        ),
        "norm": save_adapter(
            model, tmp_path / "norm", seed=3, modules_to_save=["input_layernorm"], **targets
        ),
    }
    engine = start(tiny_model("llama"), brings, compile_cache=cache)

    ask_all(engine, brings)
    check_all(engine, model, brings)


@pytest.mark.parametrize("fastest", [pytest.param("onednn", marks=pytest.mark.full), "kernel"])
def test_a_model_in_bfloat16_is_compiled_to_the_bit(
    start: Callable[..., Harness],
    adapters: dict[str, Path],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    prefer: Callable[[str], None],
    fastest: str,
) -> None:
    """What is fused is rounded where torch's operators round."""
    prefer(fastest)
    monkeypatch.setattr(
        compiling, "check_alike", lambda *given: check_alike(*given[:5], tolerance=0.0)
    )
    engine = start(tiny_model("llama").bfloat16(), compile_cache=cache)

    assert engine.engine.stats().compiled
    ask_all(engine, adapters)
    assert all(len(engine.answers[name].tokens) == 8 for name in [*adapters, "base"])


@pytest.mark.usefixtures("only_kernels", "free_tokens")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_what_was_computed_before_or_drafted(
    start: Callable[..., Harness], cache: Path, dtype: torch.dtype
) -> None:
    """A prompt's last token alone, an answer's tokens one by one, or several of them as a chunk."""
    asked = [3 + (7 * n) % 200 for n in range(70)]
    scored = {"max_tokens": 24, "logprobs": 3}
    plain = start(tiny_model("llama").to(dtype), compile_cache=cache, prefix_cache=False)
    engine = start(tiny_model("llama").to(dtype), compile_cache=cache, speculation=True)
    assert engine.engine.stats().compiled

    first = plain.ask(asked, "default", **scored)
    for prediction in ([], [], first.tokens):
        again = engine.ask(asked, "default", prediction=prediction, **scored)
        assert again.logprobs == first.logprobs
    assert again.predicted > 8
    said = [*asked, *first.tokens, 9]
    assert (
        engine.ask(said, "default", **scored).logprobs
        == plain.ask(said, "default", **scored).logprobs
    )


def test_layers_of_two_kinds_are_compiled_apart(start: Callable[..., Harness], cache: Path) -> None:
    """Gemma 2's layers see a window and everything in turns."""
    model = tiny_model("gemma2")
    engine = start(tiny_model("gemma2"), {}, compile_cache=cache)
    long = [5 + n % 40 for n in range(60)]
    engine.submit("long", long, max_tokens=8)
    engine.wait()

    assert engine.engine.stats().compiled
    assert engine.answers["long"].tokens == Oracle(model).greedy(long, 8)


def test_without_a_compiler_the_blocks_stay_as_they_are_with_one_warning(
    start: Callable[..., Harness],
    llama: PreTrainedModel,
    adapters: dict[str, Path],
    cache: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    no_compiler = inductor.patch({"cpp.cxx": ("/does/not/exist",)})
    with (
        no_compiler,
        caplog.at_level(logging.WARNING, "infuse.server.engine.native.forward.execution"),
    ):
        engine = start(compile_cache=cache)
    one = dict(list(adapters.items())[:1])

    assert not engine.engine.stats().compiled
    assert len([r for r in caplog.records if "does not compile" in r.message]) == 1
    ask_all(engine, one)
    check_all(engine, llama, one)


def test_a_damaged_cache_is_made_anew(start: Callable[..., Harness], cache: Path) -> None:
    start(compile_cache=cache)
    torch.compiler.reset()
    for file in cache.rglob("*"):
        if file.is_file():
            file.unlink()  # This process may have it loaded.
            file.write_bytes(b"damaged")

    assert start(compile_cache=cache).engine.stats().compiled


@pytest.mark.usefixtures("only_kernels")
def test_a_later_start_neither_traces_nor_compiles(
    start: Callable[..., Harness], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {"compile_cache": cache, "trace_cache": tmp_path / "traces"}
    start(**kept)
    torch.compiler.reset()
    monkeypatch.setattr(tracing, "make_fx", Mock(side_effect=AssertionError))
    monkeypatch.setattr(GraphLowering, "run", Mock(side_effect=AssertionError))

    assert start(**kept).engine.stats().compiled


def test_warm_compiles_a_model_into_the_cache_that_later_starts_use(
    tmp_path: Path,
) -> None:
    environment = os.environ | {"INFUSE_CACHE_DIR": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    infuse = Path(sys.executable).with_name("infuse")
    command = [infuse, "warm", "--model", save_tiny_model(tmp_path / "tiny")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
    assert any((tmp_path / "compiled").rglob("*.so"))
