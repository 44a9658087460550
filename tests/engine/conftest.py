from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from infuse.server.engine.native.kernels.linear import Pack, linear_kernels
from infuse.server.engine.native.model import packing
from infuse.server.engine.native.model.packing import pack_for_onednn
from tests.engine.harness import Harness
from tests.factories import save_adapter, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "regex": {
        "target_modules": r".*layers\.1\.(self_attn\.(q|v)|mlp\.up)_proj",
        "feedforward_modules": r".*up_proj",
    },
    "all-but-layer-0": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
        "exclude_modules": r".*layers\.0\..*",
    },
    "queries": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "attention-output": {"target_modules": ["o_proj"], "feedforward_modules": []},
    "attention-output-inward": {"target_modules": ["o_proj"], "feedforward_modules": ["o_proj"]},
    "mlp-outward": {
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "feedforward_modules": [],
    },
    "mlp-inward": {
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "feedforward_modules": ["gate_proj", "up_proj", "down_proj"],
    },
    "lm-head": {"target_modules": ["lm_head"], "feedforward_modules": []},
    "lm-head-inward": {"target_modules": ["lm_head"], "feedforward_modules": ["lm_head"]},
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": r".*\.down_proj"},
}
"""Adapters whose targets, and whose sides, differ from each other's."""


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Mapping[torch.dtype, Pack]:
    return linear_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="session")
def kernel(kernels: Mapping[torch.dtype, Pack]) -> Pack:
    """What packs a float32 layer for our own kernel."""
    return kernels[torch.float32]


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose what packs linear layers, "onednn" or "kernel", instead of measuring the fastest."""

    def prefer(name: str) -> None:
        def costs(kinds: Sequence[tuple[Pack, torch.dtype]], _rows: Sequence[int]) -> list[float]:
            return [float((pack is pack_for_onednn) == (name == "kernel")) for pack, _ in kinds]

        monkeypatch.setattr(packing, "costs", costs)

    return prefer


@pytest.fixture
def only_kernels(prefer: Callable[[str], None]) -> None:
    prefer("kernel")


@pytest.fixture(scope="session")
def adapters(llama: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {
        name: save_adapter(llama, root / name, seed=seed, **config)
        for seed, (name, config) in enumerate(KINDS.items(), start=1)
    }


@pytest.fixture
def start(tmp_path: Path, adapters: dict[str, Path]) -> Iterator[Callable[..., Harness]]:
    """Start an engine on the tiny llama, or on another model; it stops with the test."""
    started: list[Harness] = []

    def start(
        base: PreTrainedModel | None = None,
        offered: Mapping[str, Path] | None = None,
        **config: Any,
    ) -> Harness:
        folder = tmp_path / f"store-{len(started)}"
        model = tiny_model("llama") if base is None else base
        harness = Harness(model, folder, adapters if offered is None else offered, **config)
        started.append(harness)
        return harness

    yield start
    for harness in started:
        harness.close()
