"""Adapters of several kinds for the tiny llama, saved by PEFT, with what PEFT computes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from tests.adapters.oracle import logits, peft_logits, vectors_of
from tests.factories import save_adapter, tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "queries": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "mlp_out": {"target_modules": ["down_proj", "k_proj"], "feedforward_modules": []},
}
IDS = torch.randint(3, 128, (1, 6), generator=torch.Generator().manual_seed(5))
"""Every row and segment of a step is the beginning of this text."""


@dataclass(frozen=True)
class Known:
    """Each kind's folder and vectors, and what PEFT computes with it: `[token, logits]`."""

    folders: dict[str, Path]
    vectors: dict[str, AdapterVectors]
    by_peft: dict[str, torch.Tensor]

    @classmethod
    def saved_in(cls, root: Path) -> "Known":
        base = tiny_llama()
        folders = {
            kind: save_adapter(base, root / kind, seed=seed, **config)
            for seed, (kind, config) in enumerate(KINDS.items())
        }
        by_peft = {kind: peft_logits(base, IDS, folder)[0] for kind, folder in folders.items()}
        return cls(
            folders,
            {kind: vectors_of(folder, base) for kind, folder in folders.items()},
            {"base": peft_logits(base, IDS)[0], **by_peft},
        )

    def step(self, kinds: dict[int, str], rows: list[int], segments: list[Segment]) -> torch.Tensor:
        """Return what `packed_logits` must give where slots hold these kinds: PEFT, each alone."""
        parts = [(slot, 1) for slot in rows] + [(s.slot, s.tokens) for s in segments]
        return torch.cat([self.by_peft[kinds.get(slot, "base")][:n] for slot, n in parts])


def packed_logits(model: IA3Slots, rows: list[int], segments: list[Segment]) -> torch.Tensor:
    """Run a step: the text's first token in each row, its beginning in each segment."""
    lengths = [1] * len(rows) + [segment.tokens for segment in segments]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(1, -1)
    model.set_packed(rows, segments)
    return logits(model.base, IDS[:, positions[0]], position_ids=positions, use_cache=False)[0]
