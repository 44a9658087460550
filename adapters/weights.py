"""The tensors of a weights file that is being checked: none of its numbers stay in memory."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

_PIECE = 1 << 18
"""Values of a tensor that are looked at together."""
_MAPPED = 1 << 22
"""Bytes that are looked at before the file is opened again: they stay in memory until then."""


class StagedTensors(Mapping[str, torch.Tensor]):
    """A safetensors file's tensors by their keys, on the meta device: they have shapes and dtypes,
    and `pieces` reads their values. A stranger's file may say that a tensor takes gigabytes.

    For one thread, and as long as the file is there.
    """

    def __init__(self, path: Path, named: Callable[[Collection[str]], Mapping[str, str]]) -> None:
        """Reads the header alone. `named` says of the file's keys what each is called here.

        Raises what `safe_open` raises for a file that is damaged."""
        self._path = path
        self._file = safe_open(path, framework="pt")
        self._looked_at = 0
        """Bytes, since the file was opened."""
        self._keys = named(self._file.keys())  # type: ignore[no-untyped-call]
        self._tensors = {
            key: torch.empty_like(self._find(key), device="meta") for key in self._keys
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
            if self._looked_at > _MAPPED:
                self._file = safe_open(self._path, framework="pt")
                self._looked_at = 0
            piece = self._find(key).flatten()[start : start + _PIECE]
            self._looked_at += piece.nbytes
            yield piece

    def _find(self, key: str) -> torch.Tensor:
        """A view of the file, of which nothing is in memory yet."""
        tensor: torch.Tensor = self._file.get_tensor(self._keys[key])  # type: ignore[no-untyped-call]
        return tensor


def pieces_of(tensors: Mapping[str, torch.Tensor], key: str) -> Iterator[torch.Tensor]:
    """The values of a tensor, `[values]`, a few at a time, whether it is in memory or not."""
    if isinstance(tensors, StagedTensors):
        yield from tensors.pieces(key)
    else:
        yield from torch.split(tensors[key].detach().flatten(), _PIECE)
