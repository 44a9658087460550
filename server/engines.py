"""Opens the engine that the settings name, with the base model that it serves.

Each engine is imported only where it is used: an environment with vLLM has an older transformers,
with which our own engine does not run.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import transformers
from transformers import PreTrainedTokenizerFast

from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.residency import Residency, SlotHolder
from infuse.server.engine import Engine, EngineError
from infuse.server.engine.model_files import cache_dir
from infuse.server.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A base model, and how to start the engine over it."""

    name: str
    """The hub id, or the folder's name."""
    tokenizer: PreTrainedTokenizerFast
    modules: BaseModules
    slots: SlotHolder
    engine: Callable[[Residency], Engine]
    """Make the engine, once adapters have a residency in `slots`."""


def open_engine(settings: Settings, known: Iterable[IA3Config] = ()) -> Opened:
    """Load the model. `known`: the configs of the adapters that there are, read where an engine
    must know them before it starts. Raises EngineError."""
    return _open_vllm(settings, known) if settings.engine == "vllm" else _open_native(settings)


def _open_native(settings: Settings) -> Opened:
    from infuse.adapters.model.slots import IA3Slots

    try:
        from infuse.server.engine.native import Engine as NativeEngine
        from infuse.server.engine.native import EngineConfig, load_model
    except ImportError as error:
        raise EngineError(
            f"our own engine does not run with transformers {transformers.__version__} "
            f"({error}): install this package with its constraints.txt, or use --engine vllm"
        ) from error

    config = EngineConfig(
        max_rows=settings.max_batch_rows,
        max_queue=settings.max_queue,
        max_queue_seconds=settings.max_queue_seconds,
        hang_timeout=settings.hang_timeout,
        max_model_len=settings.max_model_len,
        kv_cache_tokens=settings.kv_cache_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        prefix_cache=settings.prefix_cache,
        pack_linears=settings.pack_linears,
        trace_cache=cache_dir() / "traces",
        compile_cache=cache_dir() / "compiled" if settings.compile else None,
        speculation=settings.speculation,
    )
    loaded = load_model(settings.model, settings.device, settings.dtype, settings.quantization)
    ia3 = IA3Slots(loaded.model, settings.max_resident_adapters, settings.max_saved_module_bytes)
    return Opened(
        name=loaded.name,
        tokenizer=loaded.tokenizer,
        modules=ia3.modules_of_base,
        slots=ia3,
        engine=lambda residency: NativeEngine(loaded, ia3, residency, config),
    )


def _open_vllm(settings: Settings, known: Iterable[IA3Config]) -> Opened:
    from infuse.server.engine.vllm.config import EngineConfig
    from infuse.server.engine.vllm.llm import open_llm

    config = EngineConfig(
        max_rows=settings.max_batch_rows,
        max_queue=settings.max_queue,
        max_queue_seconds=settings.max_queue_seconds,
        hang_timeout=settings.hang_timeout,
        max_model_len=settings.max_model_len,
        max_adapters=settings.max_resident_adapters,
        dtype=settings.dtype,
        kv_cache_tokens=settings.kv_cache_tokens,
        prefill_chunk_tokens=settings.prefill_chunk_tokens,
        prefix_cache=settings.prefix_cache,
        targets=settings.ia3_targets,
        options=json.loads(settings.vllm_options),
    )
    llm = open_llm(settings.model, config, known)

    def start(residency: Residency) -> Engine:
        # vLLM is installed: `open_llm` has seen it.
        from infuse.server.engine.vllm.engine import Engine as VllmEngine

        return VllmEngine(llm, residency, config)

    return Opened(
        name=llm.base.name,
        tokenizer=llm.base.tokenizer,
        modules=llm.base.modules,
        slots=llm.slots,
        engine=start,
    )
