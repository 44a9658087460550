"""Memory for keys and values on the CPU: slabs of equal size, each cut into strips of one length.

A slab can be cut to another length once it is empty. The operating system assigns memory only as
it is written.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from infuse.server.engine.native.attention import LayerMemory, LayerShape


class Strip(NamedTuple):
    """A stretch of every layer's memory that holds the keys and values of consecutive tokens."""

    length: int
    """Tokens that the strip holds."""
    number: int
    """The strip's index if all memory were cut into strips of its length."""


class Slabs:
    """Hands out strips. A slab is opened for strips of one length and closed when all are free."""

    def __init__(self, shapes: Sequence[LayerShape], *, slabs: int, slab_tokens: int) -> None:
        self._slab_tokens = slab_tokens
        self.memory = [LayerMemory.empty(slabs * slab_tokens, shape) for shape in shapes]
        """One for each layer."""
        self._empty = list(reversed(range(slabs)))
        self._slabs: dict[int, tuple[int, list[bool]]] = {}
        """Slab -> the length of its strips, and which of them are taken."""

    def take(self, length: int) -> Strip | None:
        """Take a free strip of this length from an open slab."""
        for slab, (slab_length, taken) in self._slabs.items():
            if slab_length == length and not all(taken):
                index = taken.index(False)
                taken[index] = True
                return Strip(length, slab * len(taken) + index)
        return None

    def open(self, length: int, last: bool = False) -> Strip | None:
        """Open the first empty slab (or the last one) for strips of this length and take the first
        of them."""
        if not self._empty:
            return None
        slab = self._empty.pop(0 if last else -1)
        taken = [True] + [False] * (self._slab_tokens // length - 1)
        self._slabs[slab] = (length, taken)
        return Strip(length, slab * len(taken))

    def free(self, strip: Strip) -> None:
        slab = self.slab_of(strip)
        taken = self._slabs[slab][1]
        index = strip.number - slab * len(taken)
        assert taken[index], "a strip is freed once"
        taken[index] = False
        if not any(taken):
            del self._slabs[slab]
            self._empty.append(slab)
            self._empty.sort(reverse=True)

    def slab_of(self, strip: Strip) -> int:
        return strip.number * strip.length // self._slab_tokens

    def keys(self, layer: int, length: int) -> torch.Tensor:
        """View all keys of a layer as strips of this length:
        `[strips, kv_heads, length, key_dim]`."""
        memory = self.memory[layer]
        return memory.keys.view(-1, memory.kv_heads, length, memory.keys.shape[1])

    def values(self, layer: int, length: int) -> torch.Tensor:
        """View all values of a layer likewise: `[strips, kv_heads, length, value_dim]`."""
        memory = self.memory[layer]
        return memory.values.view(-1, memory.kv_heads, length, memory.values.shape[1])

    def pairs(self, length: int, other: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """View each layer's keys, and its values, as strips of one length and of another."""
        return [
            (strips(layer, length), strips(layer, other))
            for layer in range(len(self.memory))
            for strips in (self.keys, self.values)
        ]
