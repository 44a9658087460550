"""Memory for keys and values on the CPU: slabs of equal size, each cut into strips of one length.

A slab takes another length once it is empty. Memory is touched only as it is written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.attention import LayerShape


@dataclass(frozen=True, slots=True)
class Place:
    strip: int
    """Tokens that the strip holds."""
    number: int
    """Of the strip, if all memory were cut into strips of its length."""


class Slabs:
    def __init__(self, shapes: Sequence[LayerShape], slabs: int, slab_tokens: int) -> None:
        self._shapes = list(shapes)
        self._slab_tokens = slab_tokens
        tokens = slabs * slab_tokens
        self.key_memory = [
            torch.empty(tokens * s.kv_heads, s.key_dim, dtype=s.dtype) for s in shapes
        ]
        """Each layer's."""
        self.value_memory = [
            torch.empty(tokens * s.kv_heads, s.value_dim, dtype=s.dtype) for s in shapes
        ]
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
        shape = self._shapes[layer]
        return self.key_memory[layer].view(-1, shape.kv_heads, length, shape.key_dim)

    def values(self, layer: int, length: int) -> torch.Tensor:
        """`[strips, kv_heads, length, value_dim]`."""
        shape = self._shapes[layer]
        return self.value_memory[layer].view(-1, shape.kv_heads, length, shape.value_dim)

    def pairs(self, length: int, other: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each layer's keys and values, as strips of one length and of another."""
        return [
            (strips(layer, length), strips(layer, other))
            for layer in range(len(self._shapes))
            for strips in (self.keys, self.values)
        ]
