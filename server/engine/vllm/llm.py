"""vLLM's engine on an event loop of its own, and the slots of its workers."""

import asyncio
import logging
import math
import threading
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import psutil
from pydantic import ValidationError
from safetensors.torch import save

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.targets import BaseModules, Target
from infuse.server.engine.errors import DoesNotFit, EngineError, UnsupportedModel
from infuse.server.engine.vllm.config import PLAN, EngineConfig
from infuse.server.engine.vllm.environment import environment_of_workers
from infuse.server.engine.vllm.loading import Base, check_version, describe_base
from infuse.server.engine.vllm.stats import Counts
from infuse.server.engine.vllm.targets import check_targets, planned_targets

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_WORKER = "infuse.server.engine.vllm.worker.IA3Worker"
_CPU_CACHE_BYTES = 4 << 30
"""The KV cache on a CPU where no size is set, if a quarter of the free memory is not less."""


class Slots:
    """The slots of vLLM's workers, as `Residency` fills them. Belongs to the loop of the engine.

    A slot is filled while requests run: vLLM's workers do it between two steps. Only the requests
    that use the slot wait for it.
    """

    saved_capacity = 0
    """vLLM cannot exchange whole modules."""

    def __init__(self, targets: tuple[Target, ...], capacity: int) -> None:
        self.capacity = capacity
        self.targets = targets
        self._numbers = {target: number for number, target in enumerate(targets)}
        self._vectors: dict[int, AdapterVectors] = {}
        self._filling: dict[int, asyncio.Task[None]] = {}
        self.send: Callable[[int, bytes], Coroutine[Any, Any, None]]
        """Fills a slot in all workers; set once they run."""

    def check(self, vectors: AdapterVectors) -> None:
        """Raises InvalidAdapter for what cannot be in a slot."""
        check_targets(vectors, self._numbers.keys())

    def packed(self, vectors: AdapterVectors) -> bytes:
        """The vectors as `IA3Worker.ia3_fill` takes them."""
        by_number = {str(self._numbers[t]): vector for t, vector in vectors.vectors.items()}
        return save({number: vector.contiguous() for number, vector in by_number.items()})

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None:
        self._vectors[slot] = vectors
        filling = self.send(slot, self.packed(vectors))
        self._filling[slot] = asyncio.get_running_loop().create_task(filling)

    def clear_slot(self, slot: int) -> None:
        """Nothing is left behind: a slot is overwritten as a whole."""

    async def filled(self, slot: int) -> None:
        """Wait until a slot is filled. Where that has failed, try once more."""
        if self._filling[slot].done() and self._filling[slot].exception() is not None:
            self.fill_slot(slot, self._vectors[slot])
        await asyncio.shield(self._filling[slot])


class Llm:
    """An `AsyncLLM` whose workers rescale, and the thread of its loop."""

    def __init__(self, base: Base, slots: Slots, config: EngineConfig) -> None:
        """Starts vLLM's processes, which load and compile the model. Raises EngineError."""
        self.base = base
        self.slots = slots
        self.counts = Counts()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self.run(self._open(config))
        except BaseException:
            self.close()
            raise

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run on the loop and wait. Not for the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _open(self, config: EngineConfig) -> None:
        # Imported late: vLLM takes seconds, and an environment without it has the other engine.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            with environment_of_workers(current_platform.is_cpu(), _workers(config)):
                arguments = AsyncEngineArgs(**_arguments(self.base, self.slots, config))
                settings = arguments.create_engine_config()
                self.max_model_len = settings.model_config.max_model_len
                # A prompt that is only scored may fill the window; vLLM generates one token more,
                # which is dropped and never read.
                settings.model_config.max_model_len += 1
                if (tokens := config.kv_cache_tokens) is not None:
                    cache = settings.cache_config
                    cache.num_gpu_blocks_override = -(-tokens // cache.block_size)
                self.engine = AsyncLLM.from_vllm_config(
                    settings, disable_log_stats=True, stat_loggers=[self.counts.logger]
                )
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            reason = _reason(error)
            kind = DoesNotFit if "memory" in reason.lower() else UnsupportedModel
            raise kind(f"vLLM does not serve {self.base.name}: {reason}") from error
        held = await self.engine.collective_rpc("ia3_targets")
        missing = set(range(len(self.slots.targets))).difference(*held)
        if missing:
            first = self.slots.targets[min(missing)]
            raise UnsupportedModel(
                f"vLLM computes {len(missing)} of the modules that --ia3-targets names without a "
                f"layer that could be rescaled, {first.module} among them: name others"
            )
        self.compiled = bool(settings.compilation_config.mode)
        self.bank_bytes = sum(await self.engine.collective_rpc("ia3_bytes"))
        self.kv_cache_bytes = sum(await self.engine.collective_rpc("ia3_kv_cache_bytes"))
        self.slots.send = self._fill

    async def _fill(self, slot: int, vectors: bytes) -> None:
        """Fill a slot. Raises EngineDeadError when vLLM's processes end meanwhile: nothing else
        would end the wait."""
        from vllm.v1.engine.exceptions import EngineDeadError

        filling = self.loop.create_task(
            self.engine.collective_rpc("ia3_fill", args=(slot, vectors))
        )
        ends = self.engine.output_handler
        await asyncio.wait([filling, ends], return_when=asyncio.FIRST_COMPLETED)
        if not filling.done():
            filling.cancel()
            raise EngineDeadError
        filling.result()

    @property
    def is_open(self) -> bool:
        return self._thread.is_alive()

    def kill(self) -> None:
        """Kill vLLM's processes, also those that are stopped or hang."""
        for core in self.engine.engine_core.resources.engine_manager.processes:
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(core.pid)
                for each in [*process.children(recursive=True), process]:
                    each.kill()

    def close(self) -> None:
        """End vLLM's processes and the loop."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()


def open_llm(model: str | None, config: EngineConfig, known: Iterable[IA3Config] = ()) -> Llm:
    """Start vLLM for a hub id, a folder, or (None) the default model. `known`: the configs of the
    adapters that there are. Raises EngineError."""
    check_version()
    base = describe_base(model)
    targets = planned_targets(base.modules, config.targets, known)
    return Llm(base, Slots(targets, config.max_adapters), config)


def worker_arguments(modules: BaseModules, slots: Slots) -> dict[str, Any]:
    """The arguments of vLLM's engine that make its workers rescale."""
    plan = {
        "targets": [[target.module, target.side.value] for target in slots.targets],
        "sizes": {target.module: modules.sizes[target.module] for target in slots.targets},
        "slots": 1 + slots.capacity,
    }
    return {"worker_cls": _WORKER, "additional_config": {PLAN: plan}}


def _workers(config: EngineConfig) -> int:
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    return math.prod(int(config.options.get(size, 1)) for size in sizes)


def _reason(error: Exception) -> str:
    """What vLLM says of an error, without what pydantic says of vLLM's configs."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())


def _arguments(base: Base, slots: Slots, config: EngineConfig) -> dict[str, Any]:
    """The arguments of vLLM's engine."""
    from vllm.platforms import current_platform

    given: dict[str, Any] = {
        "model": base.source,
        "dtype": base.dtype if config.dtype == "auto" else config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_rows,
        "max_num_batched_tokens": config.prefill_chunk_tokens,
        "enable_prefix_caching": config.prefix_cache,
        "max_logprobs": -1,
        "skip_tokenizer_init": False,
        "structured_outputs_config": {"backend": "guidance"},
        "enable_log_requests": False,
    }
    if current_platform.is_cpu():
        free = psutil.virtual_memory().available
        given["kv_cache_memory_bytes"] = min(_CPU_CACHE_BYTES, free // 4)
    ours = worker_arguments(base.modules, slots)
    taken = config.options.keys() & (given.keys() | ours.keys())
    if taken:
        raise EngineError(f"--vllm-options: {min(taken)} is set by a setting of Infuse's own")
    given |= config.options
    return {name: value for name, value in given.items() if value is not None} | ours
