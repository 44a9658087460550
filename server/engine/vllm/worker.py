"""vLLM's worker with IA3: it rescales the layers of its model, and knows the slot of each token.

vLLM imports this by name (`worker_cls`) in its own processes. All that reaches into vLLM's insides
is here and in `layers`.
"""

import os
import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils import torch_utils

from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.model.bank import BASE_SLOT
from infuse.server.engine.vllm.config import PLAN, SERVER, SLOT
from infuse.server.engine.vllm.layers import IA3Layers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class IA3Runner:
    """Mixed into the class of vLLM's model runner."""

    ia3: IA3Layers
    vllm_config: VllmConfig

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner: Any = self
        plan = self.vllm_config.additional_config[PLAN]
        self.ia3 = IA3Layers(
            runner.get_model(),
            [Target(module, Side(side)) for module, side in plan["targets"]],
            {module: tuple(size) for module, size in plan["sizes"].items()},
            plan["slots"],
            runner.max_num_tokens,
            runner.device,
        )

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        runner: Any = self
        batch = runner.input_batch
        requests = [runner.requests[request_id] for request_id in batch.req_ids[: batch.num_reqs]]
        slots = [self.slot_of(each.sampling_params.extra_args or {}) for each in requests]
        by_token = np.repeat(np.array(slots), num_scheduled_tokens[: len(slots)])
        torch_utils.async_tensor_h2d(by_token, out=self.ia3.slots[: len(by_token)])
        return super()._prepare_inputs(scheduler_output, num_scheduled_tokens)  # type: ignore[misc]

    def slot_of(self, asked: Mapping[str, Any]) -> int:
        """The slot of a request, by its `SamplingParams.extra_args`."""
        return int(asked.get(SLOT, BASE_SLOT))

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        with self._kept_generators():
            return super().sample_tokens(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _kept_generators(self) -> Iterator[None]:
        """Within: requests whose prompt is computed in part have no generator.

        vLLM draws a token for them too, and sets their generators back by an offset, which
        generators on a CPU do not have: its worker would end (vLLM 0.32).
        """
        runner: Any = self
        generators = runner.input_batch.generators
        in_part = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
        kept = {row: generators.pop(row) for row in in_part.tolist() if row in generators}
        try:
            yield
        finally:
            generators.update(kept)


class IA3Worker(Worker):  # type: ignore[misc]
    """What `collective_rpc` may call, besides vLLM's own methods."""

    runner: ClassVar[type[IA3Runner]] = IA3Runner

    def init_device(self) -> None:
        if SERVER in os.environ:
            server = int(os.environ[SERVER])
            threading.Thread(target=_end_with, args=(server,), daemon=True).start()
        super().init_device()
        if self.use_v2_model_runner:
            raise RuntimeError("IA3 needs vLLM's first model runner: VLLM_USE_V2_MODEL_RUNNER=0")
        runner: Any = self.model_runner
        kind = type(runner)
        runner.__class__ = type(f"IA3{kind.__name__}", (self.runner, kind), {})

    @property
    def _layers(self) -> IA3Layers:
        layers: IA3Layers = self.model_runner.ia3
        return layers

    def ia3_targets(self) -> list[int]:
        """The numbers of the planned targets that this worker rescales."""
        return self._layers.held

    def ia3_bytes(self) -> int:
        """Bytes of this worker's banks."""
        return self._layers.nbytes

    def ia3_kv_cache_bytes(self) -> int:
        """Bytes of this worker's part of the KV cache. Layers of hybrid models share memory."""
        sizes: dict[int, int] = {}
        for cache in self.model_runner.kv_caches:
            for tensor in cache if isinstance(cache, list) else [cache]:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
        return sum(sizes.values())

    @torch.inference_mode()
    def ia3_fill(self, slot: int, vectors: bytes) -> None:
        """Fill a slot. `vectors`: a safetensors file, with the number of each vector's target."""
        by_number = {int(number): vector for number, vector in load(vectors).items()}
        self._layers.fill(slot, by_number)


def _end_with(server: int) -> None:
    """End this process when the server's has ended, even by SIGKILL; vLLM's engine ends with its
    workers. By itself it would run on, and keep the device's memory."""
    with suppress(ProcessLookupError):
        # Readable when the process has ended, also before its parent has taken notice.
        select.select([os.pidfd_open(server)], [], [])
    os._exit(1)
