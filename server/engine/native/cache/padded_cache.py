"""Keys and values of rows that run padded, in the form that transformers' own caches have.

Rows that run together lie in one *group*, for each layer `[rows, heads, columns, dim]`. They are
aligned at the right: every row's newest token has the same column, and what a row is shorter by is
empty at its left. That is the one layout in which all model families batch, also those that count
positions from the end of their cache. A group stays as long as its rows run together; rows that
come together anew are copied into a group of their own, once for each change of the batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from transformers.cache_utils import Cache

from server.engine.errors import DoesNotFit
from server.engine.native.attention import LayerShape
from server.engine.native.cache.padded_group import Group
from server.engine.native.cache.padded_layers import (
    CacheMaker,
    KeysAndValues,
    LayerStates,
    States,
    states_nbytes,
)
from server.engine.native.faults import FAULTS, Fault, KeysLost

_COLUMNS = 64
"""A group's columns are a multiple of this many, so that it seldom grows."""


@dataclass(frozen=True, slots=True)
class _Part:
    row: int
    begin: int
    end: int


class PaddedBlocks:
    """Blocks in the groups of running rows, and copies of their own. Of an encoder-decoder, one
    block is what its decoder keeps of a whole source."""

    def __init__(self, cache: "PaddedCache", crosses: bool) -> None:
        self._cache = cache
        self.size = None if crosses else _COLUMNS
        self._in_rows: dict[int, _Part] = {}
        self._copies: dict[int, list[KeysAndValues]] = {}
        """For each layer `[1, heads, tokens, dim]`."""
        self._names = count()
        self.tokens = 0

    def keep(self, row: int, start: int, tokens: int) -> list[int]:
        size = self.size or tokens
        parts = [
            _Part(row, begin, min(begin + size, start + tokens))
            for begin in range(start, start + tokens, size)
        ]
        blocks = [next(self._names) for _ in parts]
        self._in_rows.update(zip(blocks, parts, strict=True))
        return blocks

    def leave(self, row: int) -> list[int]:
        mine = sorted((p.begin, block) for block, p in self._in_rows.items() if p.row == row)
        while mine and self._cache.holds(row):
            part = self._in_rows[mine[0][1]]
            if self._cache.room < _rounded(part.end - part.begin):
                break
            block = mine[0][1]
            try:
                copies = [(keys.clone(), values.clone()) for keys, values in self._layers(block)]
            except FAULTS as error:
                if not Fault.of(error).no_memory:
                    raise
                break
            mine.pop(0)
            self._copies[block] = copies
            del self._in_rows[block]
            self.tokens += _taken(self._copies[block])
        return [block for _, block in mine]

    def drop(self, block: int) -> None:
        if block in self._copies:
            self.tokens -= _taken(self._copies.pop(block))
        else:
            del self._in_rows[block]

    def has_place(self, block: int) -> bool:
        return block in self._copies

    def in_the_way(self, blocks: Iterable[int]) -> Sequence[int]:
        return list(islice(filter(self.has_place, blocks), 1))

    def layers(self, blocks: Sequence[int]) -> list[KeysAndValues]:
        """For each layer `[1, heads, tokens, dim]`: all of their tokens."""
        return [
            (torch.cat([keys for keys, _ in layer], 2), torch.cat([v for _, v in layer], 2))
            for layer in zip(*map(self._layers, blocks), strict=True)
        ]

    def _layers(self, block: int) -> list[KeysAndValues]:
        if block in self._copies:
            return self._copies[block]
        part = self._in_rows[block]
        span = slice(part.begin, part.end)
        layers = self._cache.layers_of(part.row, crossed=self.size is None)
        return [(keys[:, :, span], values[:, :, span]) for keys, values in layers]


def _taken(kept: list[KeysAndValues]) -> int:
    return _rounded(kept[0][0].shape[2])


class PaddedCache:
    """A `KVCache` of groups. Its budget counts padding: rows times the longest of them."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        total_tokens: int,
        max_tokens: int,
        device: torch.device,
        crosses: bool = False,
        carried: Sequence[LayerStates] = (),
        max_rows: int = 0,
        make_cache: CacheMaker = Cache,
    ) -> None:
        """`crosses`: an encoder-decoder, whose layers keep as much of the source as of the answer.
        `carried`: for each layer, the states that it carries beside keys and values; room for those
        of `max_rows` rows lies outside of the budget of tokens.

        Raises DoesNotFit where the longest row does not fit.
        """
        if total_tokens < _rounded(max_tokens):
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set kv-cache-tokens to {_rounded(max_tokens)} or more, or max-model-len lower"
            )
        self.total_tokens = total_tokens
        self.nbytes = total_tokens * sum(s.nbytes for s in shapes) * (2 if crosses else 1)
        self.nbytes += states_nbytes(carried, max_rows)
        self.shares = not any(each.count for each in carried)
        self._shapes = list(shapes)
        self._states = [each.count for each in carried] or [0] * len(shapes)
        self._device = device
        self._crosses = crosses
        self._make_cache = make_cache
        self._reserved: dict[int, int] = {}
        self._groups: dict[int, Group] = {}
        self.blocks = PaddedBlocks(self, crosses)

    @property
    def used_tokens(self) -> int:
        return len(self._reserved) * max(list(self._reserved.values()), default=0)

    @property
    def room(self) -> int:
        return self.total_tokens - self.used_tokens - self.blocks.tokens

    def reserve(self, row: int, tokens: int) -> bool:
        wanted = self._reserved | {row: max(_rounded(tokens), self._reserved.get(row, 0))}
        if len(wanted) * max(wanted.values()) + self.blocks.tokens > self.total_tokens:
            return False
        self._reserved = wanted
        return True

    def begin(self, row: int, blocks: Sequence[int], shared: int, tokens: int) -> bool:
        assert row not in self._groups, "only a new row begins"
        if not self.reserve(row, tokens):
            return False
        layers = [
            (keys[:, :, :shared], values[:, :, :shared])
            for keys, values in self.blocks.layers(blocks)
        ]
        # Its columns are full: the row's first step copies it into a group of its own.
        if self._crosses:
            own = [(keys[:, :, :0], values[:, :, :0]) for keys, values in layers]
            self._groups[row] = Group([row], [0], 0, 0, own, [shared], layers, self._nothing)
        else:
            self._groups[row] = Group([row], [0], shared, shared, layers, [], [], self._nothing)
        return True

    def holds(self, row: int) -> bool:
        """Whether the row's keys and values are there; not so once they were lost."""
        return row in self._groups

    def layers_of(self, row: int, crossed: bool) -> list[KeysAndValues]:
        """For each layer `[1, heads, tokens, dim]`: a row's own tokens, or those of its source."""
        group = self._groups[row]
        index = group.rows.index(row)
        span = slice(0, group.sources[index]) if crossed else slice(group.starts[index], group.end)
        layers = group.crossed if crossed else group.layers
        return [
            (keys[index, None, :, span], values[index, None, :, span]) for keys, values in layers
        ]

    def release(self, row: int) -> None:
        self._reserved.pop(row, None)
        self._groups.pop(row, None)

    def order(self, rows: Sequence[int]) -> list[int]:
        """By arrival, so that the others keep their order when one leaves."""
        return sorted(rows)

    def gather(
        self, rows: Sequence[int], lengths: Sequence[int], tokens: int, sources: Sequence[int] = ()
    ) -> Group:
        """The group of exactly these rows, with columns for `tokens` more.

        `lengths`: how many tokens of each row count. Where a group's last forward went further, its
        step failed later on, and what it wrote is undone.
        `sources`: of an encoder-decoder, the length of each row's source. Raises KeysLost.
        """
        for row, length in zip(rows, lengths, strict=True):
            old = self._groups.get(row)
            if old is not None and old.length(row) != length:
                old.undo()
            assert old is None or old.length(row) == length, "one forward is undone at most"
        group = self._groups.get(rows[0])
        if group is None or group.rows != list(rows) or group.end + tokens > group.columns:
            try:
                group = self._group(list(rows), tokens, list(sources))
            except (RuntimeError, MemoryError) as error:
                for row in rows:
                    self._groups.pop(row, None)
                raise KeysLost from error
            self._groups |= dict.fromkeys(rows, group)
        return group

    def _group(self, rows: list[int], tokens: int, sources: list[int]) -> Group:
        parts = self._parts(rows)
        spent = [old for old, _ in parts if self._stay_in(old).issubset(rows)]
        lengths = {row: old.length(row) for old, mine in parts for row in mine}
        end = max(lengths.values(), default=0)
        columns = _rounded(end + tokens)
        starts = [end - lengths.get(row, 0) for row in rows]
        layers = []
        for layer, shape in enumerate(self._shapes):
            keys, values = self._empty(shape, len(rows), columns)
            for old, mine in parts:
                to, at = self._indices(rows, mine), self._indices(old.rows, mine)
                width = max(lengths[row] for row in mine)
                for new, kept in zip((keys, values), old.layers[layer], strict=True):
                    new[to, :, end - width : end] = kept[at, :, old.end - width : old.end]
            layers.append((keys, values))
            for old in spent:
                # Never two copies of all layers at once.
                old.layers[layer] = (keys[:0], values[:0])
        crossed = self._crossed(rows, parts, sources) if parts and self._crosses else []
        states = self._joined_states(rows, parts) if parts else self._nothing
        return Group(rows, starts, end, columns, layers, sources, crossed, states, self._make_cache)

    @property
    def _nothing(self) -> list[States]:
        """What new rows carry."""
        return [[None] * (2 * pairs) for pairs in self._states]

    def _joined_states(self, rows: list[int], parts: list[tuple[Group, list[int]]]) -> list[States]:
        joined: list[States] = []
        for layer, pairs in enumerate(self._states):
            assert not pairs or sum(len(mine) for _, mine in parts) == len(rows), (
                "rows that carry a state do not run with new ones"
            )
            states: States = []
            for number in range(2 * pairs):
                state: torch.Tensor | None = None
                for old, mine in parts:
                    kept = old.states[layer][number]
                    if kept is None:
                        continue
                    if state is None:
                        state = kept.new_empty(len(rows), *kept.shape[1:])
                    state[self._indices(rows, mine)] = kept[self._indices(old.rows, mine)]
                states.append(state)
            joined.append(states)
        return joined

    def _crossed(
        self, rows: list[int], parts: list[tuple[Group, list[int]]], sources: list[int]
    ) -> list[KeysAndValues]:
        longest = max(sources)
        layers = []
        for layer, shape in enumerate(self._shapes):
            keys, values = self._empty(shape, len(rows), longest)
            for old, mine in parts:
                to, at = self._indices(rows, mine), self._indices(old.rows, mine)
                for new, kept in zip((keys, values), old.crossed[layer], strict=True):
                    width = min(longest, kept.shape[2])
                    new[to, :, :width] = kept[at, :, :width]
            layers.append((keys, values))
        return layers

    def _empty(self, shape: LayerShape, rows: int, columns: int) -> KeysAndValues:
        """Zeros: what is empty is masked, but NaN times a weight of 0 is NaN."""
        size = (rows, shape.kv_heads, columns)
        keys = torch.zeros(*size, shape.key_dim, dtype=shape.dtype, device=self._device)
        return keys, torch.zeros(*size, shape.value_dim, dtype=shape.dtype, device=self._device)

    def _parts(self, rows: Sequence[int]) -> list[tuple[Group, list[int]]]:
        """The groups that these rows are in now, with those of them that have something there."""
        parts: list[tuple[Group, list[int]]] = []
        for row in rows:
            group = self._groups.get(row)
            if group is None or not (group.length(row) or group.crossed):
                continue
            known = next((mine for old, mine in parts if old is group), None)
            if known is None:
                parts.append((group, [row]))
            else:
                known.append(row)
        return parts

    def _stay_in(self, group: Group) -> set[int]:
        return {row for row in group.rows if self._groups.get(row) is group}

    def _indices(self, rows: list[int], mine: list[int]) -> torch.Tensor:
        return torch.tensor([rows.index(row) for row in mine], device=self._device)


def _rounded(tokens: int) -> int:
    return -(-tokens // _COLUMNS) * _COLUMNS
