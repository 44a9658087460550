"""IA3 for a server that is vLLM's own: `vllm serve` with the adapters of a folder.

    INFUSE_IA3_ADAPTERS=./adapters vllm serve MODEL --no-enable-prefix-caching \\
        --worker-cls server.engine.vllm.plugin.FolderWorker \\
        --logits-processors server.engine.vllm.plugin:NamedAdapter

A request names its adapter in `vllm_xargs`: `{"ia3": "support-de"}`. The folder holds a folder for
each adapter, as PEFT saved it, and is read once, at the start. All else that Infuse does (the life
of an adapter over HTTP, revisions, mixtures, a prefix cache that knows adapters) needs its server.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor

from adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
from adapters.checkpoint.config import CONFIG_FILE
from server.engine.vllm.config import PLAN, SLOT
from server.engine.vllm.llm import Slots, worker_arguments
from server.engine.vllm.loading import check_version, describe_base
from server.engine.vllm.targets import planned_targets
from server.engine.vllm.worker import IA3Worker

FOLDER = "INFUSE_IA3_ADAPTERS"
"""The environment variable that names the folder of adapters."""
ADAPTER = "ia3"
"""The key of an adapter's name in a request's `vllm_xargs`."""


@cache
def adapters_by_slot() -> tuple[Path, ...]:
    """The folders of the adapters: that of slot 1 first. Raises ValueError."""
    folder = Path(os.environ.get(FOLDER, ""))
    found = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    if not os.environ.get(FOLDER) or not found:
        raise ValueError(f"set {FOLDER} to a folder that holds a folder for each adapter")
    return tuple(found)


class FolderWorker(IA3Worker):
    """Has each adapter of the folder in a slot of its own, from the start to the end."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        check_version()
        if vllm_config.cache_config.enable_prefix_caching:
            raise ValueError(
                "vLLM's prefix cache does not know which adapter a prompt was computed with: "
                "start with --no-enable-prefix-caching"
            )
        checkpoints = [read_checkpoint(folder) for folder in adapters_by_slot()]
        modules = describe_base(vllm_config.model_config.model).modules
        targets = planned_targets(modules, "", [each.config for each in checkpoints])
        slots = Slots(targets, len(checkpoints))
        self._contents = [slots.packed(effective_vectors(each, modules)) for each in checkpoints]
        plan = worker_arguments(modules, slots)["additional_config"]
        # The plan is a part of the key of the compile cache.
        vllm_config.additional_config = {**vllm_config.additional_config, PLAN: plan[PLAN]}
        super().__init__(vllm_config, *args, **kwargs)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        for slot, contents in enumerate(self._contents, start=1):
            self.ia3_fill(slot, contents)


class NamedAdapter(LogitsProcessor):  # type: ignore[misc]
    """Turns the name of a request's adapter into its slot, where vLLM checks the request. It leaves
    logits as they are."""

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises ValueError, which vLLM answers with 400."""
        given = params.extra_args or {}
        if SLOT in given:
            raise ValueError(f"vllm_xargs.{SLOT} is set by the server; name an adapter: {ADAPTER}")
        if ADAPTER in given:
            names = [folder.name for folder in adapters_by_slot()]
            if given[ADAPTER] not in names:
                raise ValueError(
                    f"there is no IA3 adapter '{given[ADAPTER]}'; there are {', '.join(names)}"
                )
            params.extra_args = {**given, SLOT: 1 + names.index(given[ADAPTER])}

    def __init__(self, config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass
