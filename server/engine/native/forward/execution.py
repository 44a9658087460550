"""Prepares a base model for the engine: flat if that is exact, else padded."""

import logging
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch._inductor.exc import InvalidCxxCompiler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.errors import UnsupportedModel
from infuse.server.engine.native.attention import LayerShape, StepContext, install, probe
from infuse.server.engine.native.cache.kv_cache import FlatCache, KVCache
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from infuse.server.engine.native.cache.padded_layers import maker_of, states_nbytes
from infuse.server.engine.native.cache.planning import Limits, cache_tokens, make_flat_cache
from infuse.server.engine.native.forward.compiling import CompiledForward, compile_forward
from infuse.server.engine.native.forward.fidelity import Fidelity, Unfaithful
from infuse.server.engine.native.forward.padded_runner import PaddedRunner
from infuse.server.engine.native.forward.probing import continues_states, probe_padded
from infuse.server.engine.native.forward.runner import FlatRunner, Modules, Runner
from infuse.server.engine.native.forward.trace_cache import find_or_trace, key_of
from infuse.server.engine.native.forward.tracing import Forward, NotTraced, TracedForward
from infuse.server.engine.native.kernels.attention import Kernels, attention_kernels
from infuse.server.engine.native.kernels.linear import Pack, linear_kernels
from infuse.server.engine.native.kernels.operators import load_operators
from infuse.server.engine.native.model.norms import fuse_norms
from infuse.server.engine.native.model.packing import noting_siblings, pack_linears, panel_width_of
from infuse.server.engine.native.model.time_steps import limit_time_steps

log = logging.getLogger(__name__)

_FLAT_LAYERS = {"full_attention", "sliding_attention"}
"""Layer types whose attention depends only on the row's own keys."""


@dataclass(frozen=True, slots=True)
class Execution:
    """The parts of the engine that depend on the model: its KV cache and its runner."""

    kind: Literal["flat", "padded"]
    cache: KVCache
    runner: Runner
    compiled: bool = False
    whole_prompts: bool = False
    """Whether a prompt must be computed in one step."""


def prepare(
    ia3: IA3Slots,
    *,
    tokenizer: PreTrainedTokenizerFast,
    decoder_start: tuple[int, ...] | None,
    max_rows: int,
    max_model_len: int,
    kv_cache_tokens: int | None,
    pack: bool,
    trace_cache: Path | None,
    compile_cache: Path | None,
) -> Execution:
    """Prepare a model to run, and compare it with the plain model. The bank is made anew.

    `trace_cache`: the folder for a flat model's trace and for the result of the comparison; None:
    keep neither. `compile_cache`: compile the model and keep the result there; None: do not.

    Raises DoesNotFit, and UnsupportedModel if the model is exact neither flat nor padded.
    """
    base = ia3.base
    kept = base.config._attn_implementation
    max_tokens = max_model_len * (1 if decoder_start is None else 2)
    limits = Limits(max_rows=max_rows, max_tokens=max_tokens)
    asked = _Asked(limits, kv_cache_tokens, pack, trace_cache, compile_cache)
    file = None
    if trace_cache is not None:
        settings = (max_model_len, pack, compile_cache is not None, torch.get_num_threads())
        key = key_of(base, repr(settings), processor_of(base.device))
        file = trace_cache / f"compared-{key}.json"
    try:
        fidelity = Fidelity(
            ia3, tokenizer, decoder_start, max_model_len=max_model_len, max_rows=max_rows, kept=file
        )
    except Exception as error:  # A model's code may raise anything.
        name = type(base).__name__
        raise UnsupportedModel(f"{name} does not run on token ids alone: {error}") from error
    try:
        return _prepare_flat(ia3, fidelity, asked)
    except UnsupportedModel as error:
        why_not_flat = str(error)
    log.info("Running %s padded: %s", type(base).__name__, why_not_flat)
    base.set_attn_implementation(kept)
    try:
        return _prepare_padded(ia3, fidelity, asked)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"{error}; and it cannot be run flat: {why_not_flat}") from error


def processor_of(device: torch.device) -> str:
    """The model of a device's processor. Part of a cache key: others may round differently."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()


@dataclass(frozen=True, slots=True)
class _Asked:
    """The settings that `prepare` was called with."""

    limits: Limits
    kv_cache_tokens: int | None
    pack: bool
    trace_cache: Path | None
    compile_cache: Path | None


def _prepare_flat(ia3: IA3Slots, fidelity: Fidelity, asked: _Asked) -> Execution:
    """Raises UnsupportedModel if a flat batch would give wrong results."""
    base = ia3.base
    _check_flat(base)
    context = install(base)
    try:
        with noting_siblings(base) as siblings:
            shapes = probe(base, context)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise UnsupportedModel(f"{type(base).__name__} fails on a flat batch: {error}") from error
    kernels = _kernels(base.device, asked.pack, asked.compile_cache, shapes)
    _optimise(base, asked.pack, kernels.linears, siblings, fidelity.read)
    _renew_bank(ia3)
    cache = make_flat_cache(
        shapes,
        base.device,
        total_tokens=cache_tokens(
            shapes,
            base.device,
            asked.limits,
            asked=asked.kv_cache_tokens,
            set_aside=ia3.saved_capacity,
        ),
        max_tokens=asked.limits.max_tokens,
        kernels=kernels.attention,
    )
    modules = Modules(base)

    def runner(forward: Forward | None) -> FlatRunner:
        return FlatRunner(ia3, context, cache, modules, forward, asked.limits)

    try:
        fidelity.compare("by its modules", runner(None), cache)
    except Unfaithful as error:
        raise UnsupportedModel(f"in a flat batch {error}") from error
    _renew_bank(ia3)
    traced = _trace(ia3, context, modules, cache, asked.trace_cache, asked.compile_cache)
    # A compiled forward runs some batches by the traced forward, so both must be right.
    faithful = None
    for forward in _forwards(traced):
        what = "compiled" if isinstance(forward, CompiledForward) else "as traced"
        try:
            fidelity.compare(what, runner(forward), cache)
        except Unfaithful as error:
            log.warning("The model does not run %s: %s", what, error)
            break
        faithful = forward
    is_compiled = isinstance(faithful, CompiledForward)
    if faithful is traced and is_compiled == (asked.compile_cache is not None):
        # Else a later start could run the model in a way that was not compared.
        fidelity.keep()
    if base.device.type != "cpu" and faithful is not traced:
        faithful = None
    _renew_bank(ia3)
    return Execution("flat", cache, runner(faithful), is_compiled)


def _forwards(
    traced: TracedForward | CompiledForward | None,
) -> list[TracedForward | CompiledForward]:
    if traced is None:
        return []
    return [traced.traced, traced] if isinstance(traced, CompiledForward) else [traced]


def _renew_bank(ia3: IA3Slots) -> None:
    """Replace the bank by an empty one, since the comparison has made columns in it."""
    ia3.unload()
    width = panel_width_of(ia3.base)
    if width is not None:
        ia3.bank.use_panels(width)


def _trace(
    ia3: IA3Slots,
    context: StepContext,
    modules: Modules,
    cache: FlatCache,
    trace_cache: Path | None,
    compile_cache: Path | None,
) -> TracedForward | CompiledForward | None:
    """Trace and compile the model as far as possible. None: the model runs by its modules."""
    if compile_cache is None and ia3.base.device.type != "cpu":
        return None
    try:
        traced = find_or_trace(ia3, context, modules, trace_cache)
    except NotTraced as error:
        log.log(
            logging.INFO if compile_cache is None else logging.WARNING,
            "%s runs by its modules: %s",
            type(ia3.base).__name__,
            error,
        )
        return None
    if compile_cache is None:
        return traced
    try:
        return compile_forward(ia3, context, modules, traced, cache, compile_cache)
    except NotTraced as error:
        log.warning("The model does not compile and runs uncompiled: %s", error)
        return traced if ia3.base.device.type == "cpu" else None


@dataclass(frozen=True, slots=True)
class _Kernels:
    """Our kernels; empty if they cannot or shall not be compiled."""

    linears: Mapping[torch.dtype, Pack] = field(default_factory=dict)
    attention: Kernels = field(default_factory=dict)


def _kernels(
    device: torch.device,
    pack: bool,
    compile_cache: Path | None,
    shapes: Sequence[LayerShape] = (),
) -> _Kernels:
    """Compile or load our kernels. `shapes`: the layers that need attention kernels."""
    if compile_cache is None or device.type != "cpu":
        return _Kernels()
    cache = compile_cache.with_name("kernels")
    try:
        linears = linear_kernels(cache) if pack else {}
        load_operators(cache)
        return _Kernels(linears, attention_kernels(shapes, cache))
    except (OSError, InvalidCxxCompiler, subprocess.CalledProcessError) as error:
        log.warning("The model runs without kernels of our own: %s", error)
        return _Kernels()


def _check_flat(model: PreTrainedModel) -> None:
    """Check what the probe's single token does not show. Raises UnsupportedModel."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} has an encoder")
    if model._is_stateful:
        raise UnsupportedModel(f"{name} carries a state from token to token")
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if kinds - _FLAT_LAYERS:
        raise UnsupportedModel(f"{name} has layers of {', '.join(sorted(kinds - _FLAT_LAYERS))}")


def _prepare_padded(ia3: IA3Slots, fidelity: Fidelity, asked: _Asked) -> Execution:
    base = ia3.base
    if hasattr(base.config, "expert_capacity"):
        raise UnsupportedModel(
            f"{type(base).__name__} leaves out tokens that its experts have no room for, and which "
            "ones depends on what is computed together (expert_capacity)"
        )
    ia3.unload()
    limit_time_steps(base)
    shapes, carried = probe_padded(ia3)
    can_continue = not any(each.count for each in carried) or continues_states(ia3, shapes, carried)
    linears = _kernels(base.device, asked.pack, asked.compile_cache).linears
    _optimise(base, asked.pack, linears, read=fidelity.read)
    crosses = bool(base.config.is_encoder_decoder)
    both = [*shapes, *shapes] if crosses else shapes
    cache = PaddedCache(
        shapes,
        base.device,
        total_tokens=cache_tokens(
            both,
            base.device,
            asked.limits,
            asked=asked.kv_cache_tokens,
            set_aside=ia3.saved_capacity,
            states=states_nbytes(carried, asked.limits.max_rows),
        ),
        max_tokens=asked.limits.max_tokens,
        crosses=crosses,
        carried=carried,
        max_rows=asked.limits.max_rows,
        make_cache=maker_of(base),
    )
    if not cache.shares:
        log.info("No prompt is shared: what %s carries cannot be cut.", type(base).__name__)
    runner = PaddedRunner(ia3, cache, can_continue)
    try:
        fidelity.compare("padded", runner, cache)
    except Unfaithful as error:
        name = type(base).__name__
        raise UnsupportedModel(f"{name} cannot be run padded: {error}") from error
    fidelity.keep()
    ia3.unload()
    return Execution("padded", cache, runner, whole_prompts=not can_continue)


def _optimise(
    model: PreTrainedModel,
    pack: bool,
    kernels: Mapping[torch.dtype, Pack],
    siblings: Sequence[Sequence[str]] = (),
    read: Collection[str] = (),
) -> None:
    """Fuse norms and pack linear layers, in place. Layers that are done already stay."""
    if model.device.type == "cpu":
        fuse_norms(model)
    if pack and (layers := pack_linears(model, siblings, kernels, read)):
        which = "oneDNN" if panel_width_of(model) is None else "our kernel"
        log.info("Packed %d linear layers for %s.", layers, which)
