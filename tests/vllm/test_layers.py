"""Modules are found in the layers of vLLM's workers, or left out where that would be a guess."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM has an environment of its own: constraints-vllm.txt")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

from infuse.adapters.checkpoint.targets import Side, Target
from infuse.server.engine.vllm.layers import IA3Layers

HIDDEN, INNER, STATES, HEADS = 8, 16, 4, 4
WORKERS = 2


class Mixer(MambaMixer2):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters: dict[str, Any] = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].weight_loader(parameters[name], weight)


def mixer(groups: int) -> Mixer:
    return Mixer(HIDDEN, STATES, 4, INNER, True, False, groups, HEADS, INNER // HEADS)


@pytest.mark.parametrize(("groups", "is_found"), [(1, False), (2, True)])
@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_group_of_mamba_2_that_two_workers_share_is_left_out(
    monkeypatch: pytest.MonkeyPatch, rank: int, groups: int, is_found: bool
) -> None:
    worker = SimpleNamespace(rank_in_group=rank, world_size=WORKERS)
    monkeypatch.setattr(parallel_state, "_TP", worker)
    outputs = 2 * INNER + 2 * groups * STATES + HEADS
    target = Target("in_proj", Side.OUTPUT)
    with set_current_vllm_config(VllmConfig()):
        layers = IA3Layers(
            mixer(groups), [target], {"in_proj": (HIDDEN, outputs)}, 2, 1, torch.device("cpu")
        )

    assert layers.held == ([0] if is_found else [])
