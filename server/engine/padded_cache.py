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
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from server.engine.attention import LayerShape
from server.engine.errors import DoesNotFit
from server.engine.faults import FAULTS, Fault
from server.engine.kv_cache import KeysLost

_COLUMNS = 64
"""A group's columns are a multiple of this many, so that it seldom grows."""

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a group was before a forward."""

    starts: list[int]
    end: int
    encoded: bool


@dataclass(slots=True)
class Group:
    """Rows that run together. Row i's tokens are in the columns `starts[i]:end`."""

    rows: list[int]
    starts: list[int]
    end: int
    columns: int
    layers: list[KeysAndValues]
    """Each `[rows, heads, columns, dim]`."""
    sources: list[int]
    """Of an encoder-decoder: how many tokens of each row's source the decoder attends to."""
    crossed: list[KeysAndValues]
    """Of an encoder-decoder, once the sources are encoded: each `[rows, heads, source, dim]`,
    aligned at the left."""

    def mark(self) -> Mark:
        return Mark(list(self.starts), self.end, bool(self.crossed))

    def go_back(self, mark: Mark) -> None:
        """What was computed since then has not been."""
        self.starts, self.end = mark.starts, mark.end
        if not mark.encoded:
            self.crossed.clear()

    def length(self, row: int) -> int:
        """Tokens of a row that have keys and values."""
        return self.end - self.starts[self.rows.index(row)]

    def cache(self) -> Cache:
        """What a transformers model takes as its `past_key_values` and writes new tokens to."""
        own = Cache(layers=[_OwnLayer(self, layer) for layer in range(len(self.layers))])
        if not self.sources:
            return own
        crossed = Cache(layers=[_CrossLayer(self, layer) for layer in range(len(self.layers))])
        return EncoderDecoderCache(own, crossed)


class _OwnLayer(CacheLayerMixin):
    """A layer's keys and values of the rows' own tokens."""

    def __init__(self, group: Group, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._group = group
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, *_: object) -> None:
        raise AssertionError("made whole")

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> KeysAndValues:
        keys, values = self._group.layers[self._layer]
        start, end = self._group.end, self._group.end + key_states.shape[-2]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self) -> int:
        return self._group.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._group.end + query_length, 0

    def get_max_length(self) -> int:
        return -1


class _CrossLayer(_OwnLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values of the sources: written whole by the first forward, then read."""

    def __init__(self, group: Group, layer: int) -> None:
        super().__init__(group, layer)
        if layer < len(group.crossed):
            self.keys, self.values = group.crossed[layer]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: object, **__: object
    ) -> KeysAndValues:
        self._group.crossed.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])


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
    ) -> None:
        """`crosses`: an encoder-decoder, whose layers keep as much of the source as of the answer.

        Raises DoesNotFit where the longest row does not fit.
        """
        if total_tokens < _rounded(max_tokens):
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set kv-cache-tokens to {_rounded(max_tokens)} or more, or max-model-len lower"
            )
        self.total_tokens = total_tokens
        self.nbytes = total_tokens * sum(s.nbytes for s in shapes) * (2 if crosses else 1)
        self._shapes = list(shapes)
        self._device = device
        self._crosses = crosses
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
            self._groups[row] = Group([row], [0], 0, 0, own, [shared], layers)
        else:
            self._groups[row] = Group([row], [0], shared, shared, layers, [], [])
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

    def gather(self, rows: Sequence[int], tokens: int, sources: Sequence[int] = ()) -> Group:
        """The group of exactly these rows, with columns for `tokens` more.

        `sources`: of an encoder-decoder, the length of each row's source. Raises KeysLost.
        """
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
        return Group(rows, starts, end, columns, layers, sources, crossed)

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
