"""A traced forward gives, to the bit, what the model's modules give; or there is none."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import standalone_compile
from torch.fx import GraphModule
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.native.attention import Probe, StepContext, install, run_probe
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.forward import compiling
from infuse.server.engine.native.forward.compiling import compile_forward
from infuse.server.engine.native.forward.runner import Modules
from infuse.server.engine.native.forward.tracing import Forward, NotTraced, trace
from infuse.server.engine.native.kernels.linear import Pack
from infuse.server.engine.native.kernels.operators import load_operators
from infuse.server.engine.native.model.norms import fuse_norms
from infuse.server.engine.native.model.packing import noting_siblings, pack_linears, panel_width_of
from tests.every_family import tiny_of
from tests.factories import run_by_modules, tiny_model

FLAT = ["llama", "gpt2", "gpt_neox", "qwen3", "gemma2", "phi", "opt", "cohere"]


def prepared(
    base: PreTrainedModel, pack: bool, kernel: Pack | None = None
) -> tuple[IA3Slots, StepContext, Modules]:
    ia3 = IA3Slots(base, 4)
    context = install(base)
    with noting_siblings(base) as siblings:
        run_probe(base, context)
    fuse_norms(base)
    if pack:
        pack_linears(base, siblings, {} if kernel is None else {torch.float32: kernel})
    width = panel_width_of(base)
    if width is not None:
        ia3.bank.use_panels(width)
    return ia3, context, Modules(base)


@torch.inference_mode()
def run(forward: Forward, context: StepContext, tokens: int, keep: list[int]) -> torch.Tensor:
    ids = 5 + torch.arange(tokens)[None] * 3 % 50
    positions = torch.arange(tokens)[None] % 40
    with context.step(Probe()):
        return forward(ids, positions, torch.tensor(keep, dtype=torch.long))


def vectors(ia3: IA3Slots, endings: dict[str, Side]) -> AdapterVectors:
    """Random ones for the linear layers whose names end so."""
    targets = [
        Target(module, side)
        for module in ia3.modules_of_base.sizes
        for ending, side in endings.items()
        if module.endswith(ending)
    ]
    return AdapterVectors({t: torch.rand(ia3.modules_of_base.size(t)) + 0.5 for t in targets})


def assert_equal(context: StepContext, one: Forward, other: Forward) -> None:
    for tokens, keep in ((1, [0]), (2, []), (5, [0, 4]), (40, [0, 1, 2, 39])):
        found, wanted = (run(each, context, tokens, keep) for each in (one, other))
        assert torch.equal(found, wanted), tokens


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("family", FLAT)
def test_flat_families_are_traced_to_the_bit(family: str, pack: bool) -> None:
    ia3, context, modules = prepared(tiny_model(family), pack)

    assert_equal(context, trace(ia3, context, modules), modules)


@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("pack", [False, True, "by kernel"])
@pytest.mark.parametrize(
    "endings",
    [
        {"k_proj": Side.OUTPUT, "v_proj": Side.OUTPUT, "down_proj": Side.INPUT},
        {"q_proj": Side.INPUT, "up_proj": Side.OUTPUT, "lm_head": Side.OUTPUT},
    ],
)
def test_adapters_that_come_after_the_trace_count(
    pack: bool | str, endings: dict[str, Side], kernel: Pack
) -> None:
    """Also where they rescale what only some of the layers that are packed as one read."""
    ours = kernel if pack == "by kernel" else None
    ia3, context, modules = prepared(tiny_model("llama"), bool(pack), ours)
    assert (panel_width_of(ia3.base) is None) == (ours is None)
    traced = trace(ia3, context, modules)
    base = run(traced, context, 5, [0, 4])
    ia3.fill_slot(1, vectors(ia3, endings))
    ia3.fill_slot(2, vectors(ia3, endings))

    ia3.bank.reserve_rows(2)
    ia3.set_packed([1, 2], [Segment(1, 3)], [Segment(1, 0)])
    found = run(traced, context, 5, [0, 1])
    assert torch.equal(found, run(modules, context, 5, [0, 1]))
    assert not torch.equal(found[0], base[0])

    ia3.clear_slot(1)
    ia3.clear_slot(2)
    ia3.set_packed([0, 0], [Segment(0, 3)])
    assert torch.equal(run(traced, context, 5, [0, 4]), base)


@pytest.mark.usefixtures("only_kernels")
def test_compiled_it_gives_nearly_the_same_whatever_adapters_rescale(
    kernel: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind a gate that a kernel computes, and where the kernels cannot rescale."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    load_operators(tmp_path)
    ia3, context, modules = prepared(tiny_model("llama"), pack=True, kernel=kernel)
    cache = StripCache(list(run_probe(ia3.base, context).values()), total_tokens=128, max_tokens=64)
    traced = trace(ia3, context, modules)
    breaking = threading.Event()

    def breakable(module: GraphModule, *given: Any, **settings: Any) -> Callable[..., Any]:
        silu = torch.ops.aten.silu.default
        assert all(node.target is not silu for node in module.graph.nodes), "kernels gate"
        run = standalone_compile(module, *given, **settings)

        def run_or_break(*inputs: torch.Tensor) -> Any:
            if breaking.is_set():
                raise RuntimeError("API call failed")
            return run(*inputs)

        return run_or_break

    monkeypatch.setattr(compiling, "standalone_compile", breakable)
    compiled = compile_forward(ia3, context, modules, traced, cache, tmp_path)
    ia3.bank.reserve_rows(2)
    for endings in (
        {"k_proj": Side.OUTPUT, "v_proj": Side.OUTPUT, "down_proj": Side.INPUT},
        {"gate_proj": Side.OUTPUT, "down_proj": Side.INPUT},
        {"up_proj": Side.OUTPUT, "down_proj": Side.OUTPUT},
        {"up_proj": Side.INPUT, "down_proj": Side.INPUT},
        {"q_proj": Side.INPUT, "up_proj": Side.OUTPUT, "lm_head": Side.OUTPUT},
        {"down_proj": Side.INPUT},
    ):
        for slot in (1, 2):
            ia3.fill_slot(slot, vectors(ia3, endings))
        for rows, segments in (([1, 2], []), ([0, 2], [Segment(1, 3)]), ([0, 0], [])):
            ia3.set_packed(rows, segments, [Segment(1, 0)] if segments else [])
            tokens = 2 + sum(segment.tokens for segment in segments)
            found, wanted = (run(each, context, tokens, [0, 1]) for each in (compiled, modules))
            assert torch.allclose(found, wanted, atol=1e-5), endings

    breaking.set()
    found, wanted = (run(each, context, 2, [0, 1]) for each in (compiled, modules))
    assert torch.equal(found, wanted)


def test_a_model_whose_code_asks_for_values_is_not_traced() -> None:
    base = tiny_model("llama")
    ia3, context, modules = prepared(base, pack=False)

    def forward(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        longer = bool(positions.max() > 30)
        return modules(ids, positions, keep) * (2 if longer else 1)

    with pytest.raises(NotTraced):
        trace(ia3, context, forward)


def test_a_model_that_depends_on_the_number_of_tokens_is_not_traced() -> None:
    ia3, context, modules = prepared(tiny_model("llama"), pack=False)

    def forward(ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return modules(ids, positions, keep) * (2 if ids.shape[1] > 30 else 1)

    with pytest.raises(NotTraced, match="depends on"):
        trace(ia3, context, forward)


def test_a_model_whose_shapes_depend_on_its_tokens_is_not_traced() -> None:
    model = tiny_of("mixtral")
    model.set_experts_implementation("eager")
    ia3, context, modules = prepared(model, pack=False)

    with pytest.raises(NotTraced, match="its shapes depend on what tokens come"):
        trace(ia3, context, modules)


def test_a_model_with_hooks_runs_by_its_modules() -> None:
    ia3, context, modules = prepared(run_by_modules(tiny_model("llama")), pack=False)

    with pytest.raises(NotTraced, match="hooks"):
        trace(ia3, context, modules)
