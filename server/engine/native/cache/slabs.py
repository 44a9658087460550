"""Memory for keys and values on the CPU: slabs of equal size, each cut into strips of one length.

A slab takes another length once it is empty. Memory is touched only as it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.native.attention import LayerMemory, LayerShape


@dataclass(frozen=True, slots=True)
class Place:
    strip: int
    """Tokens that the strip holds."""
    number: int
    """Which strip it is, if all memory were cut into strips of its length."""


class Slabs:
    def __init__(self, shapes: Sequence[LayerShape], slabs: int, slab_tokens: int) -> None:
        self._slab_tokens = slab_tokens
        self.memory = [LayerMemory.empty(slabs * slab_tokens, shape) for shape in shapes]
        """Each layer's."""
        self._empty = list(reversed(range(slabs)))
        self._slabs: dict[int, tuple[int, list[bool]]] = {}
        """Slab -> the length of its strips, and which of them are taken."""

    def take(self, strip: int) -> Place | None:
        """A free strip of this length in a slab of such strips."""
        for slab, (length, taken) in self._slabs.items():
            if length == strip and not all(taken):
                index = taken.index(False)
                taken[index] = True
                return Place(strip, slab * len(taken) + index)
        return None

    def open(self, strip: int, last: bool = False) -> Place | None:
        """The first strip of this length in a slab that was empty: the first such, or the last."""
        if not self._empty:
            return None
        slab = self._empty.pop(0 if last else -1)
        taken = [True] + [False] * (self._slab_tokens // strip - 1)
        self._slabs[slab] = (strip, taken)
        return Place(strip, slab * len(taken))

    def free(self, place: Place) -> None:
        slab = self.slab_of(place)
        taken = self._slabs[slab][1]
        index = place.number - slab * len(taken)
        assert taken[index], "a strip is freed once"
        taken[index] = False
        if not any(taken):
            del self._slabs[slab]
            self._empty.append(slab)
            self._empty.sort(reverse=True)

    def slab_of(self, place: Place) -> int:
        return place.number * place.strip // self._slab_tokens

    def keys(self, layer: int, length: int) -> torch.Tensor:
        """All memory as strips of this length: `[strips, kv_heads, length, key_dim]`."""
        memory = self.memory[layer]
        return memory.keys.view(-1, memory.kv_heads, length, memory.keys.shape[1])

    def values(self, layer: int, length: int) -> torch.Tensor:
        """`[strips, kv_heads, length, value_dim]`."""
        memory = self.memory[layer]
        return memory.values.view(-1, memory.kv_heads, length, memory.values.shape[1])

    def pairs(self, length: int, other: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values, as strips of one length and of another."""
        return [
            (strips(layer, length), strips(layer, other))
            for layer in range(len(self.memory))
            for strips in (self.keys, self.values)
        ]
