"""Keys and values of all rows in a fixed budget of tokens, allocated once.

`StripCache` is for the CPU: a row's keys lie in one strip, and rows in strips of one length lie
side by side, so that their attention is one batched matrix product. `PagedCache`
(`paged_cache.py`) is for CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.attention import AttentionPlan, Chunk, LayerShape
from server.engine.errors import DoesNotFit
from server.engine.strip_attention import StripPlan

SMALLEST_STRIP = 64
"""Tokens."""


class KVCache(Protocol):
    total_tokens: int
    """The budget."""
    nbytes: int
    """Bytes that the budget takes; on the CPU they are touched only as they are written."""

    @property
    def used_tokens(self) -> int:
        """What is set aside for rows, whether written or not."""
        ...

    def reserve(self, row: int, tokens: int) -> bool:
        """Make room for a row's first `tokens` tokens, keeping what it has. False: no room."""
        ...

    def fork(self, source: int, row: int, shared: int, tokens: int) -> bool:
        """Make room for the first `tokens` tokens of a row that has none yet, and let it begin with
        the keys and values of `source`'s first `shared` tokens, all of them computed. What either
        row writes later, and `source`'s release, leave the other as it is. False: no room."""
        ...

    def release(self, row: int) -> None: ...

    def order(self, rows: Sequence[int]) -> list[int]:
        """The order in which decoding rows lie best beside each other."""
        ...


class FlatCache(KVCache, Protocol):
    """A cache that attends for the flat runner."""

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        """For a batch of one token for each decoding row, then the prefill chunks. Room must be
        reserved. Decoding rows come in the order that `order` gave."""
        ...


@dataclass(slots=True)
class _Place:
    strip: int
    """Tokens that the strip holds."""
    slab: int
    index: int
    """Which strip of the slab."""


class StripCache:
    """Strips of 64, 128, … tokens, doubling up to `max_tokens`.

    The memory is cut into slabs of `max_tokens` tokens; a slab holds strips of one length and
    takes another length once it is empty. A row that outgrows its strip moves to one twice as
    long. Memory is touched only as it is written.
    """

    def __init__(self, shapes: Sequence[LayerShape], total_tokens: int, max_tokens: int) -> None:
        """`max_tokens` is the longest row. Raises DoesNotFit where two such do not fit."""
        self.slab_tokens = SMALLEST_STRIP
        while self.slab_tokens < max_tokens:
            self.slab_tokens *= 2
        slabs = total_tokens // self.slab_tokens
        if slabs < 2:
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set kv-cache-tokens to {2 * self.slab_tokens} or more, or max-model-len lower"
            )
        self.total_tokens = slabs * self.slab_tokens
        self.nbytes = self.total_tokens * sum(shape.nbytes for shape in shapes)
        self._keys = [
            torch.empty(slabs, self.slab_tokens * s.kv_heads * s.key_dim, dtype=s.dtype)
            for s in shapes
        ]
        self._values = [
            torch.empty(slabs, self.slab_tokens * s.kv_heads * s.value_dim, dtype=s.dtype)
            for s in shapes
        ]
        self._shapes = list(shapes)
        self._empty = list(reversed(range(slabs)))
        self._slabs: dict[int, tuple[int, list[bool]]] = {}
        """Slab -> the length of its strips, and which of them are taken."""
        self._places: dict[int, _Place] = {}

    @property
    def used_tokens(self) -> int:
        return sum(place.strip for place in self._places.values())

    def reserve(self, row: int, tokens: int) -> bool:
        old = self._places.get(row)
        if old is not None and tokens <= old.strip:
            return True
        if not self._take_strip(row, tokens, old, 0 if old is None else old.strip):
            return False
        if old is not None:
            self._free(old)
        return True

    def fork(self, source: int, row: int, shared: int, tokens: int) -> bool:
        assert row not in self._places, "only a new row is forked"
        return self._take_strip(row, tokens, self._places[source], shared)

    def release(self, row: int) -> None:
        place = self._places.pop(row, None)
        if place is not None:
            self._free(place)

    def order(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=self.place)

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return StripPlan(self, decode, prefill)

    def place(self, row: int) -> tuple[int, int]:
        place = self._places[row]
        return place.strip, self._number(place)

    def _number(self, place: _Place) -> int:
        """Of a strip, among all of its length."""
        return place.slab * (self.slab_tokens // place.strip) + place.index

    def keys(self, layer: int, length: int) -> torch.Tensor:
        shape = self._shapes[layer]
        return self._keys[layer].view(-1, shape.kv_heads, length, shape.key_dim)

    def values(self, layer: int, length: int) -> torch.Tensor:
        shape = self._shapes[layer]
        return self._values[layer].view(-1, shape.kv_heads, length, shape.value_dim)

    def _take_strip(self, row: int, tokens: int, origin: _Place | None, kept: int) -> bool:
        """Give the row another strip; its first `kept` tokens are copied from `origin`."""
        place = self._find_place(tokens)
        if place is None:
            return False
        self._slabs[place.slab][1][place.index] = True
        number = self._number(place)
        source = number if origin is None else self._number(origin)
        for layer in range(len(self._shapes)):
            for strips in (self.keys, self.values):
                strip = strips(layer, place.strip)[number]
                # What another row left there is masked, but NaN times a weight of 0 is NaN.
                strip[:, kept:].zero_()
                if origin is not None:
                    strip[:, :kept].copy_(strips(layer, origin.strip)[source][:, :kept])
        self._places[row] = place
        return True

    def _find_place(self, tokens: int) -> _Place | None:
        """The shortest free strip that is long enough; an empty slab is opened for the fitting
        length before a longer strip is wasted."""
        assert tokens <= self.slab_tokens, "the scheduler ends rows at the window"
        strip = SMALLEST_STRIP
        while strip < tokens:
            strip *= 2
        fitting = strip
        while strip <= self.slab_tokens:
            for slab, (length, taken) in self._slabs.items():
                if length == strip and not all(taken):
                    return _Place(strip, slab, taken.index(False))
            if strip == fitting and self._empty:
                slab = self._empty.pop()
                self._slabs[slab] = (strip, [False] * (self.slab_tokens // strip))
                return _Place(strip, slab, 0)
            strip *= 2
        return None

    def _free(self, place: _Place) -> None:
        taken = self._slabs[place.slab][1]
        assert taken[place.index], "a strip is freed once"
        taken[place.index] = False
        if not any(taken):
            del self._slabs[place.slab]
            self._empty.append(place.slab)
