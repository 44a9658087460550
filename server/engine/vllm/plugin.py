"""IA3 for a server that is vLLM's own: `vllm serve` with the adapters of a folder.

    INFUSE_IA3_ADAPTERS=./adapters VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL \\
        --no-enable-prefix-caching \\
        --worker-cls infuse.server.engine.vllm.plugin.FolderWorker \\
        --logits-processors infuse.server.engine.vllm.plugin:NamedAdapter

A request names its adapter in `vllm_xargs`: `{"ia3": "support-de"}`. The folder holds a folder for
each adapter, as PEFT saved it, and is read once, at the start. All else that Infuse does (the life
of an adapter over HTTP, revisions, mixtures, a prefix cache that knows adapters) needs its server.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed
from vllm import envs
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from infuse.adapters.checkpoint.checkpoint import AdapterVectors, effective_vectors, read_checkpoint
from infuse.adapters.checkpoint.config import CONFIG_FILE
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.model.bank import BASE_SLOT
from infuse.server.engine.vllm.config import PLAN
from infuse.server.engine.vllm.llm import Slots, worker_arguments
from infuse.server.engine.vllm.loading import check_version, describe_base
from infuse.server.engine.vllm.targets import check_targets
from infuse.server.engine.vllm.worker import IA3Runner, IA3Worker

FOLDER = "INFUSE_IA3_ADAPTERS"
"""The environment variable that names the folder of adapters."""
ADAPTER = "ia3"
"""The key of an adapter's name in a request's `vllm_xargs`."""
_START_ERROR = 1.0
"""Linux tells when a process started from the second in which the machine did: up to this many
seconds too early. The workers read the folder later than that: they import torch first."""


def folders_of_adapters() -> dict[str, Path]:
    """Name -> folder of each adapter, in order of names. Raises ValueError."""
    folder = Path(os.environ.get(FOLDER, ""))
    found = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))}
    if not os.environ.get(FOLDER) or not found:
        raise ValueError(f"set {FOLDER} to a folder that holds a folder for each adapter")
    return found


def read_adapters(modules: BaseModules) -> dict[str, AdapterVectors]:
    """What the adapters of the folder do to this base, by name. Raises ValueError for one that vLLM
    cannot serve."""
    found = {}
    for name, folder in folders_of_adapters().items():
        try:
            vectors = effective_vectors(read_checkpoint(folder), modules)
            check_targets(vectors, vectors.vectors)
        except InvalidAdapter as error:
            raise ValueError(f"the adapter '{name}' of {FOLDER} is not served: {error}") from error
        found[name] = vectors
    return found


class FolderRunner(IA3Runner):
    """Knows the slots of adapters by name."""

    ia3_numbers: Mapping[str, int]

    def slot_of(self, asked: Mapping[str, Any]) -> int:
        return self.ia3_numbers[asked[ADAPTER]] if ADAPTER in asked else BASE_SLOT


class FolderWorker(IA3Worker):
    """Has each adapter of the folder in a slot of its own, from the start to the end."""

    runner = FolderRunner

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_version()
        if envs.VLLM_USE_RUST_FRONTEND:
            raise ValueError("vLLM's Rust frontend checks no adapters: VLLM_USE_RUST_FRONTEND=0")
        if vllm_config.cache_config.enable_prefix_caching or vllm_config.kv_transfer_config:
            raise ValueError(
                "vLLM's caches do not know which adapter a prompt was computed with: start with "
                "--no-enable-prefix-caching, and without --kv-transfer-config"
            )
        modules = describe_base(vllm_config.model_config.model).modules
        self._adapters = read_adapters(modules)
        every = {target for vectors in self._adapters.values() for target in vectors.vectors}
        self._slots = Slots(tuple(sorted(every)), len(self._adapters))
        plan = worker_arguments(modules, self._slots)["additional_config"]
        # The plan is a part of the key of the compile cache.
        vllm_config.additional_config = {**vllm_config.additional_config, PLAN: plan[PLAN]}
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._check_held()
        numbers = {name: number for number, name in enumerate(self._adapters, start=1)}
        for name, vectors in self._adapters.items():
            self.ia3_fill(numbers[name], self._slots.packed(vectors))
        self.model_runner.ia3_numbers = numbers

    def _check_held(self) -> None:
        """Raises ValueError for an adapter that rescales what no worker can rescale."""
        workers = get_world_group()
        held: list[list[int]] = [[]] * workers.world_size
        torch.distributed.all_gather_object(held, self.ia3_targets(), group=workers.cpu_group)
        targets = self._slots.targets
        for number in sorted(set(range(len(targets))).difference(*held)):
            name = next(n for n, each in self._adapters.items() if targets[number] in each.vectors)
            raise ValueError(
                f"the adapter '{name}' of {FOLDER} is not served: it rescales "
                f"{targets[number].module}, which vLLM computes without a layer of its own"
            )


class NamedAdapter(LogitsProcessor):  # type: ignore[misc]
    """Refuses requests for adapters that the workers do not have, where vLLM checks requests. It
    leaves logits as they are."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises ValueError, which vLLM answers with 400."""
        name = (params.extra_args or {}).get(ADAPTER)
        if name is None:
            return
        folders = folders_of_adapters()
        if name not in list(folders):  # It may be a list, which is no key.
            known = ", ".join(folders)
            raise ValueError(f"there is no IA3 adapter '{name}'; there are {known}")
        # The workers have read the folder after this process had started.
        if _changed(folders[name]) > psutil.Process().create_time() + _START_ERROR:
            raise ValueError(f"the IA3 adapter '{name}' was changed: start vLLM again to serve it")

    def __init__(self, config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass


def _changed(folder: Path) -> float:
    """When an adapter's files were written, or moved to where they are."""
    return max(path.stat().st_ctime for path in (folder, *folder.iterdir()))
