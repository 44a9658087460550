"""The KV cache: keys and values of all sequences in a fixed budget of tokens, allocated once.

`StripCache` is for the CPU: a sequence's keys lie in one strip, and sequences in strips of one
length lie side by side, so that their attention is one batched matmul. `PagedCache`
(`paged_cache.py`) is for CUDA, `PaddedCache` (`padded_cache.py`) for models that run padded.
"""

from collections.abc import Sequence
from typing import Protocol

from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import AttentionPlan, Chunk, LayerAttention, LayerShape
from infuse.server.engine.native.cache.blocks import Blocks, StripBlocks
from infuse.server.engine.native.cache.slabs import Slabs, Strip
from infuse.server.engine.native.cache.strip_attention import StripPlan
from infuse.server.engine.native.kernels.attention import AttentionCall, Kernels

SMALLEST_STRIP = 64
"""Tokens of the shortest strip."""


class KVCache(Protocol):
    """What the scheduler asks of a KV cache. A sequence is named by its `seq_id`."""

    total_tokens: int
    """The budget."""
    nbytes: int
    """Bytes of the budget; on the CPU the system assigns them only as they are written."""
    shares: bool
    """Whether a sequence can begin with keys and values that another computed. False for models
    that carry a state from token to token: a state cannot be cut at any token."""

    @property
    def blocks(self) -> Blocks:
        """The blocks that the prefix cache keeps, within the same budget."""
        ...

    @property
    def used_tokens(self) -> int:
        """Tokens that are reserved for sequences, whether written or not."""
        ...

    def reserve(self, seq_id: int, tokens: int) -> bool:
        """Make room for a sequence's first `tokens` tokens; what the sequence has stays. False:
        there is no room, or blocks must be evicted first."""
        ...

    def begin(self, seq_id: int, blocks: Sequence[int], *, shared: int, tokens: int) -> bool:
        """Make room for the first `tokens` tokens of a new sequence, and copy the keys and values
        of the first `shared` tokens of `blocks` into it. What the sequence writes later does not
        change the blocks. False: as in `reserve`."""
        ...

    def release(self, seq_id: int) -> None: ...

    def order(self, seq_ids: Sequence[int]) -> list[int]:
        """Sort decoding rows so that neighbours in the cache are neighbours in the batch."""
        ...


class FlatCache(KVCache, Protocol):
    """A KV cache that also computes attention, for the flat runner."""

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        """Plan a step's attention: one token for each decoding row, then the prefill chunks. Room
        must be reserved, and decoding rows come in the order that `order` returned."""
        ...

    def attention_call(self, layer: LayerAttention, /) -> AttentionCall | None:
        """Make the layer's kernel callable from compiled code. None: the layer has no kernel."""
        ...


class StripCache:
    """A KV cache on the CPU in strips of 64, 128, … tokens, doubling up to `max_tokens`.

    A sequence that outgrows its strip moves to one twice as long. Blocks never change where
    sequences lie: they are evicted before a sequence takes a longer strip than it needs.
    """

    shares = True

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        total_tokens: int,
        max_tokens: int,
        kernels: Kernels | None = None,
    ) -> None:
        """`max_tokens` is the length of the longest sequence. `kernels` compute attention for the
        layers that have one, torch for the others. Raises DoesNotFit if two such sequences do not
        fit."""
        self._kernels = kernels or {}
        self._reads_unwritten = not self._kernels.keys() >= set(shapes)
        """Whether strips are cleaned: torch masks what another sequence left there, but NaN times a
        weight of 0 is NaN. Kernels do not read it."""
        self.slab_tokens = SMALLEST_STRIP
        while self.slab_tokens < max_tokens:
            self.slab_tokens *= 2
        slabs = total_tokens // self.slab_tokens
        if slabs < 2:
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set --kv-cache-tokens to {2 * self.slab_tokens} or more, or --max-model-len lower"
            )
        self.total_tokens = slabs * self.slab_tokens
        self.nbytes = self.total_tokens * sum(shape.nbytes for shape in shapes)
        self._slabs = Slabs(shapes, slabs=slabs, slab_tokens=self.slab_tokens)
        self._strips: dict[int, Strip] = {}
        """Sequence -> its strip."""
        self.blocks = StripBlocks(self._slabs, self._strips.__getitem__)
        self.keys, self.values = self._slabs.keys, self._slabs.values
        self.memory = self._slabs.memory

    @property
    def used_tokens(self) -> int:
        return sum(strip.length for strip in list(self._strips.values()))

    def reserve(self, seq_id: int, tokens: int) -> bool:
        old = self._strips.get(seq_id)
        if old is not None and tokens <= old.length:
            return True
        new = self._take_strip(tokens)
        if new is None:
            return False
        if old is not None:
            for strips, others in self._slabs.pairs(new.length, old.length):
                strips[new.number][:, : old.length].copy_(others[old.number])
            self._slabs.free(old)
        self._clean(new, 0 if old is None else old.length)
        self._strips[seq_id] = new
        return True

    def begin(self, seq_id: int, blocks: Sequence[int], *, shared: int, tokens: int) -> bool:
        assert seq_id not in self._strips, "only a new sequence begins"
        strip = self._take_strip(tokens)
        if strip is None:
            return False
        self.blocks.copy(blocks, strip)
        self._clean(strip, shared)
        self._strips[seq_id] = strip
        return True

    def release(self, seq_id: int) -> None:
        strip = self._strips.pop(seq_id, None)
        if strip is not None:
            self._slabs.free(strip)

    def order(self, seq_ids: Sequence[int]) -> list[int]:
        return sorted(seq_ids, key=self.strip_of)

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return StripPlan(self, decode, prefill, self._kernels)

    def attention_call(self, layer: LayerAttention) -> AttentionCall | None:
        memory = self.memory[layer.layer]
        kernel = self._kernels.get(memory.shape)
        return None if kernel is None else kernel.call(memory, layer)

    def strip_of(self, seq_id: int) -> Strip:
        return self._strips[seq_id]

    def _clean(self, strip: Strip, start: int) -> None:
        """Write zeros to a strip from its token `start` on, if anything reads unwritten tokens."""
        if self._reads_unwritten:
            for strips, _ in self._slabs.pairs(strip.length, strip.length):
                strips[strip.number][:, start:].zero_()

    def _take_strip(self, tokens: int) -> Strip | None:
        """Take the shortest free strip that is long enough. An empty slab is opened for the fitting
        length before a longer strip is wasted."""
        assert tokens <= self.slab_tokens, "the scheduler ends sequences at the window"
        length = SMALLEST_STRIP
        while length < tokens:
            length *= 2
        strip = self._slabs.take(length) or self._slabs.open(length)
        while strip is None and length < self.slab_tokens and not self.blocks.tokens:
            length *= 2
            strip = self._slabs.take(length)
        return strip
