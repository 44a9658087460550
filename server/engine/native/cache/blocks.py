"""Keys and values that are kept beyond the rows that computed them, in blocks of tokens.

A block is a name for what lies in the cache; the prefix cache knows which tokens it belongs to.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, groupby
from typing import Protocol

import torch

from server.engine.native.cache.slabs import Place, Slabs


class Blocks(Protocol):
    @property
    def size(self) -> int | None:
        """Tokens of a block. None: a block is what an encoder read, whatever its length."""
        ...

    @property
    def tokens(self) -> int:
        """What the blocks take of the budget that no row takes as well."""
        ...

    def keep(self, row: int, start: int, tokens: int) -> list[int]:
        """Blocks of `tokens` computed tokens of a row from `start` on, where a block begins; the
        last one may be incomplete. Until the row is left they need no room of their own."""
        ...

    def leave(self, row: int, /) -> list[int]:
        """The row is about to be released: give its blocks places of their own. Those for which
        there is no room, in order."""
        ...

    def drop(self, block: int) -> None: ...

    def has_place(self, block: int) -> bool:
        """Whether it takes room that no row takes as well."""
        ...

    def in_the_way(self, blocks: Iterable[int]) -> Sequence[int]:
        """Which of all the blocks, given least recently used first, make room for rows if they go
        together; none where rows use them all."""
        ...


class StripBlocks:
    """Blocks in the strips of running rows, and in slabs that no row needs. They are copied there,
    so that rows stay in neighbouring strips."""

    size = 32

    def __init__(self, slabs: Slabs, place_of: Callable[[int], Place]) -> None:
        """`place_of` says where a row lies."""
        self._slabs = slabs
        self._place_of = place_of
        self._places: dict[int, Place] = {}
        self._rows: dict[int, int] = {}
        """Block -> the row that it is in, where it has no place of its own."""
        self._in_row: dict[int, dict[int, int]] = {}
        """Row -> block -> which of the row's."""
        self._names = count()

    @property
    def tokens(self) -> int:
        return len(self._places) * self.size

    def keep(self, row: int, start: int, tokens: int) -> list[int]:
        first = start // self.size
        numbers = range(first, first - (-tokens // self.size))
        blocks = [next(self._names) for _ in numbers]
        self._rows.update(dict.fromkeys(blocks, row))
        self._in_row.setdefault(row, {}).update(zip(blocks, numbers, strict=True))
        return blocks

    def leave(self, row: int) -> list[int]:
        staying = self._in_row.get(row, {})
        if not staying:
            return []  # A row that never began has no place, either.
        blocks = sorted(staying, key=staying.__getitem__)
        places: list[Place] = []
        while len(places) < len(blocks):
            place = self._slabs.take(self.size) or self._slabs.open(self.size, last=True)
            if place is None:
                break
            places.append(place)
        placed = list(zip(blocks, places, strict=False))
        origin = self._place_of(row)
        numbers = [staying[block] for block, _ in placed]
        runs = list(_runs(numbers, [place.number for place in places]))
        for strips, kept in self._slabs.pairs(origin.strip, self.size):
            parts = _in_blocks(strips[origin.number], self.size)
            for number, place_number, length in runs:
                kept[place_number : place_number + length] = parts[number : number + length]
        for block, place in placed:
            self._forget_row(block)
            self._places[block] = place
        return blocks[len(placed) :]

    def drop(self, block: int) -> None:
        if block in self._places:
            self._slabs.free(self._places.pop(block))
        else:
            self._forget_row(block)

    def has_place(self, block: int) -> bool:
        return block in self._places

    def in_the_way(self, blocks: Iterable[int]) -> Sequence[int]:
        """Those of the slab that has been of no use for longest."""
        slabs: dict[int, list[int]] = {}
        for block in blocks:
            if block in self._places:
                slab = self._slabs.slab_of(self._places[block])
                # The dictionary's order is that of each slab's last block.
                members = slabs.pop(slab, [])
                members.append(block)
                slabs[slab] = members
        return next(iter(slabs.values()), [])

    def copy(self, blocks: Sequence[int], place: Place) -> None:
        """Let a strip begin with these blocks, which are the first of their rows."""
        first = 0
        for row, group in groupby(blocks, key=self._rows.get):
            part = list(group)
            numbers = list(range(first, first + len(part)))
            if row is None:
                runs = list(_runs([self._places[block].number for block in part], numbers))
                for kept, mine in self._slabs.pairs(self.size, place.strip):
                    parts = _in_blocks(mine[place.number], self.size)
                    for number, at, length in runs:
                        parts[at : at + length] = kept[number : number + length]
            else:
                origin = self._place_of(row)
                span = slice(first * self.size, (first + len(part)) * self.size)
                for strips, mine in self._slabs.pairs(origin.strip, place.strip):
                    mine[place.number, :, span] = strips[origin.number, :, span]
            first += len(part)

    def _forget_row(self, block: int) -> None:
        row = self._rows.pop(block)
        del self._in_row[row][block]
        if not self._in_row[row]:
            del self._in_row[row]


def _runs(sources: Sequence[int], targets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Neighbours that go to neighbours: the first one's source and target, and how many."""
    pairs = list(zip(sources, targets, strict=True))
    begin = 0
    for end in range(1, len(pairs) + 1):
        source, target = pairs[begin]
        if end == len(pairs) or pairs[end] != (source + end - begin, target + end - begin):
            yield source, target, end - begin
            begin = end


def _in_blocks(strip: torch.Tensor, size: int) -> torch.Tensor:
    """A strip `[kv_heads, strip, dim]` as `[blocks, kv_heads, size, dim]`."""
    return strip.view(strip.shape[0], -1, size, strip.shape[2]).transpose(0, 1)
