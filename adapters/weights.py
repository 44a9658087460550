"""The tensors of a weights file that is being checked: none of its numbers stay in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

_PIECE = 1 << 23
"""Values of a tensor that are looked at together."""


class StagedTensors(Mapping[str, torch.Tensor]):
    """A safetensors file's tensors by their keys, on the meta device: they have shapes and dtypes,
    and `pieces_of` reads their values. A stranger's file may say that a tensor takes gigabytes."""

    def __init__(self, path: Path) -> None:
        """Reads the header alone. Raises what `safe_open` raises for a file that is damaged."""
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._tensors = {
                key: torch.empty_like(file.get_tensor(key), device="meta")
                for key in list(file.keys())
            }

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        """The values of a tensor in the file's order, `[values]`, a few at a time."""
        for start in range(0, self._tensors[key].numel(), _PIECE):
            # Opened again for each: pages that were looked at stay in memory until it is closed.
            with safe_open(self._path, framework="pt") as file:
                yield file.get_tensor(key).flatten()[start : start + _PIECE]


def pieces_of(tensors: Mapping[str, torch.Tensor], key: str) -> Iterator[torch.Tensor]:
    """The values of a tensor, `[values]`, a few at a time, whether it is in memory or not."""
    if isinstance(tensors, StagedTensors):
        yield from tensors.pieces(key)
    else:
        yield from torch.split(tensors[key].detach().flatten(), _PIECE)
