"""Blocks: keys and values that the prefix cache keeps after their sequence has ended.

A block is known by a number. The prefix cache knows which tokens it holds; the KV cache knows where
they lie.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby
from typing import Protocol

import torch

from infuse.server.engine.native.cache.slabs import Slabs, Strip


class Blocks(Protocol):
    """A KV cache's blocks. A block is attached to the sequence that computed it until detached."""

    @property
    def size(self) -> int | None:
        """Tokens of a block. None: a block holds a whole encoder source, whatever its length."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of the budget that only blocks take, and no sequence."""
        ...

    def keep(self, seq_id: int, *, start: int, tokens: int) -> list[int]:
        """Keep `tokens` computed tokens of a sequence as blocks, which it returns in order.

        `start` is a multiple of the block size; the last block may be incomplete. The blocks take
        no room of their own until they are detached from the sequence.
        """
        ...

    def detach(self, seq_id: int, /) -> list[int]:
        """Give a sequence's blocks room of their own, since the sequence is about to be released.
        Returns the blocks for which there was no room, in order."""
        ...

    def drop(self, block: int) -> None: ...

    def is_detached(self, block: int) -> bool:
        """Whether only blocks, and no sequence, take the room that the block lies in."""
        ...

    def to_evict(self, blocks: Iterable[int]) -> Sequence[int]:
        """Choose which blocks to drop together so that sequences get room. `blocks` are all blocks,
        least recently used first. Empty if sequences use all of them."""
        ...


class StripBlocks:
    """Blocks of `StripCache`: in the strips of running sequences, or detached in their own strips.

    Detached blocks are copied into slabs that hold no sequence, so that sequences lie in
    neighbouring strips.
    """

    size = 32

    def __init__(self, slabs: Slabs, strip_of: Callable[[int], Strip]) -> None:
        """`strip_of` gives a sequence's strip."""
        self._slabs = slabs
        self._strip_of = strip_of
        self._strips: dict[int, Strip] = {}
        """Detached block -> its strip."""
        self._owners: dict[int, int] = {}
        """Attached block -> its sequence."""
        self._attached: dict[int, dict[int, int]] = {}
        """Sequence -> attached block -> the block's index in the sequence."""
        self._numbers = count()

    @property
    def tokens(self) -> int:
        return len(self._strips) * self.size

    def keep(self, seq_id: int, *, start: int, tokens: int) -> list[int]:
        first = start // self.size
        indices = range(first, first - (-tokens // self.size))
        blocks = [next(self._numbers) for _ in indices]
        self._owners.update(dict.fromkeys(blocks, seq_id))
        self._attached.setdefault(seq_id, {}).update(zip(blocks, indices, strict=True))
        return blocks

    def detach(self, seq_id: int) -> list[int]:
        indices = self._attached.get(seq_id, {})
        if not indices:
            return []  # A sequence that never began has no strip, either.
        blocks = sorted(indices, key=indices.__getitem__)
        strips: list[Strip] = []
        while len(strips) < len(blocks):
            strip = self._slabs.take(self.size) or self._slabs.open(self.size, last=True)
            if strip is None:
                break
            strips.append(strip)
        detached = list(zip(blocks, strips, strict=False))
        origin = self._strip_of(seq_id)
        sources = [indices[block] for block, _ in detached]
        runs = list(_runs(sources, [strip.number for strip in strips]))
        for old, kept in self._slabs.pairs(origin.length, self.size):
            parts = _in_blocks(old[origin.number], self.size)
            for source, target, length in runs:
                kept[target : target + length] = parts[source : source + length]
        for block, strip in detached:
            self._forget_owner(block)
            self._strips[block] = strip
        return blocks[len(detached) :]

    def drop(self, block: int) -> None:
        if block in self._strips:
            self._slabs.free(self._strips.pop(block))
        else:
            self._forget_owner(block)

    def is_detached(self, block: int) -> bool:
        return block in self._strips

    def to_evict(self, blocks: Iterable[int]) -> Sequence[int]:
        """Choose all blocks of the least recently used slab."""
        slabs: dict[int, list[int]] = {}
        for block in blocks:
            if block in self._strips:
                slab = self._slabs.slab_of(self._strips[block])
                # The dictionary orders slabs by the last use of any of their blocks.
                members = slabs.pop(slab, [])
                members.append(block)
                slabs[slab] = members
        return next(iter(slabs.values()), [])

    def copy(self, blocks: Sequence[int], strip: Strip) -> None:
        """Copy blocks to the beginning of a strip. They are the first blocks of their sequences."""
        first = 0
        for seq_id, group in groupby(blocks, key=self._owners.get):
            part = list(group)
            targets = list(range(first, first + len(part)))
            if seq_id is None:
                runs = list(_runs([self._strips[block].number for block in part], targets))
                for kept, new in self._slabs.pairs(self.size, strip.length):
                    parts = _in_blocks(new[strip.number], self.size)
                    for source, target, length in runs:
                        parts[target : target + length] = kept[source : source + length]
            else:
                origin = self._strip_of(seq_id)
                span = slice(first * self.size, (first + len(part)) * self.size)
                for old, new in self._slabs.pairs(origin.length, strip.length):
                    new[strip.number, :, span] = old[origin.number, :, span]
            first += len(part)

    def _forget_owner(self, block: int) -> None:
        seq_id = self._owners.pop(block)
        del self._attached[seq_id][block]
        if not self._attached[seq_id]:
            del self._attached[seq_id]


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Group copies of neighbours to neighbours. Yields each run's first source, first target and
    length."""
    pairs = list(zip(sources, targets, strict=True))
    begin = 0
    for end in range(1, len(pairs) + 1):
        source, target = pairs[begin]
        if end == len(pairs) or pairs[end] != (source + end - begin, target + end - begin):
            yield source, target, end - begin
            begin = end


def _in_blocks(strip: torch.Tensor, size: int) -> torch.Tensor:
    """View a strip `[kv_heads, length, dim]` as `[blocks, kv_heads, size, dim]`."""
    return strip.view(strip.shape[0], -1, size, strip.shape[2]).transpose(0, 1)
