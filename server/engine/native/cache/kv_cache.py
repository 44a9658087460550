"""Keys and values of all rows in a fixed budget of tokens, allocated once.

`StripCache` is for the CPU: a row's keys lie in one strip, and rows in strips of one length lie
side by side, so that their attention is one batched matrix product. `PagedCache`
(`paged_cache.py`) is for CUDA.
"""

from collections.abc import Sequence
from typing import Protocol

from server.engine.errors import DoesNotFit
from server.engine.native.attention import AttentionPlan, Chunk, LayerAttention, LayerShape
from server.engine.native.cache.blocks import Blocks, StripBlocks
from server.engine.native.cache.slabs import Place, Slabs
from server.engine.native.cache.strip_attention import StripPlan
from server.engine.native.kernels.attention import AttentionCall, Kernels

SMALLEST_STRIP = 64
"""Tokens."""


class KVCache(Protocol):
    total_tokens: int
    """The budget."""
    nbytes: int
    """Bytes that the budget takes; on the CPU they are touched only as they are written."""
    shares: bool
    """Whether a row can begin with what another has computed. A state that a row carries from token
    to token cannot be cut at any of them."""

    @property
    def blocks(self) -> Blocks:
        """What is kept beyond its row, within the same budget."""
        ...

    @property
    def used_tokens(self) -> int:
        """What is set aside for rows, whether written or not."""
        ...

    def reserve(self, row: int, tokens: int) -> bool:
        """Make room for a row's first `tokens` tokens, keeping what it has. False: no room, or
        kept blocks are in the way."""
        ...

    def begin(self, row: int, blocks: Sequence[int], shared: int, tokens: int) -> bool:
        """Make room for the first `tokens` tokens of a row that has none yet, and let it begin with
        the keys and values of the first `shared` tokens of `blocks`. What the row writes later
        leaves the blocks as they are. False: as with `reserve`."""
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

    def attention_call(self, layer: LayerAttention, /) -> AttentionCall | None:
        """For compiled code; None where no kernel attends for the layer."""
        ...


class StripCache:
    """Strips of 64, 128, … tokens, doubling up to `max_tokens`, each in a slab of its like.

    A row that outgrows its strip moves to one twice as long. Kept blocks never change where rows
    lie: they go before a row takes a longer strip than it needs.
    """

    shares = True

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        total_tokens: int,
        max_tokens: int,
        kernels: Kernels | None = None,
    ) -> None:
        """`max_tokens` is the longest row; `kernels` attend for the layers that have one. Raises
        DoesNotFit where two such rows do not fit."""
        self._kernels = kernels or {}
        self._reads_unwritten = not self._kernels.keys() >= set(shapes)
        """What another row left is masked by torch, but NaN times a weight of 0 is NaN; kernels do
        not read it."""
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
        self._slabs = Slabs(shapes, slabs, self.slab_tokens)
        self._places: dict[int, Place] = {}
        self.blocks = StripBlocks(self._slabs, self._places.__getitem__)
        self.keys, self.values = self._slabs.keys, self._slabs.values
        self.memory = self._slabs.memory

    @property
    def used_tokens(self) -> int:
        return sum(place.strip for place in list(self._places.values()))

    def reserve(self, row: int, tokens: int) -> bool:
        old = self._places.get(row)
        if old is not None and tokens <= old.strip:
            return True
        place = self._find_place(tokens)
        if place is None:
            return False
        if old is not None:
            for strips, others in self._slabs.pairs(place.strip, old.strip):
                strips[place.number][:, : old.strip].copy_(others[old.number])
            self._slabs.free(old)
        self._clean(place, 0 if old is None else old.strip)
        self._places[row] = place
        return True

    def begin(self, row: int, blocks: Sequence[int], shared: int, tokens: int) -> bool:
        assert row not in self._places, "only a new row begins"
        place = self._find_place(tokens)
        if place is None:
            return False
        self.blocks.copy(blocks, place)
        self._clean(place, shared)
        self._places[row] = place
        return True

    def release(self, row: int) -> None:
        place = self._places.pop(row, None)
        if place is not None:
            self._slabs.free(place)

    def order(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=self.place)

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return StripPlan(self, decode, prefill, self._kernels)

    def attention_call(self, layer: LayerAttention) -> AttentionCall | None:
        memory = self.memory[layer.layer]
        kernel = self._kernels.get(memory.shape)
        return None if kernel is None else kernel.call(memory, layer)

    def place(self, row: int) -> tuple[int, int]:
        place = self._places[row]
        return place.strip, place.number

    def _clean(self, place: Place, start: int) -> None:
        """A strip from its token `start` on."""
        if self._reads_unwritten:
            for strips, _ in self._slabs.pairs(place.strip, place.strip):
                strips[place.number][:, start:].zero_()

    def _find_place(self, tokens: int) -> Place | None:
        """The shortest free strip that is long enough; an empty slab is opened for the fitting
        length before a longer strip is wasted."""
        assert tokens <= self.slab_tokens, "the scheduler ends rows at the window"
        strip = SMALLEST_STRIP
        while strip < tokens:
            strip *= 2
        place = self._slabs.take(strip) or self._slabs.open(strip)
        while place is None and strip < self.slab_tokens and not self.blocks.tokens:
            strip *= 2
            place = self._slabs.take(strip)
        return place
