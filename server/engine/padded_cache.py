"""Keys and values of rows that run padded, in the form that transformers' own caches have.

Rows that run together lie in one *group*, for each layer `[rows, heads, columns, dim]`. They are
aligned at the right: every row's newest token has the same column, and what a row is shorter by is
empty at its left. That is the one layout in which all model families batch, also those that count
positions from the end of their cache. A group stays as long as its rows run together; rows that
come together anew are copied into a group of their own, once for each change of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from server.engine.attention import LayerShape
from server.engine.errors import DoesNotFit

_COLUMNS = 64
"""A group's columns are a multiple of this many, so that it seldom grows."""

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


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

    @property
    def used_tokens(self) -> int:
        return len(self._reserved) * max(self._reserved.values(), default=0)

    def reserve(self, row: int, tokens: int) -> bool:
        wanted = self._reserved | {row: max(_rounded(tokens), self._reserved.get(row, 0))}
        if len(wanted) * max(wanted.values()) > self.total_tokens:
            return False
        self._reserved = wanted
        return True

    def fork(self, source: int, row: int, shared: int, tokens: int) -> bool:
        """Of an encoder-decoder, a source that is shared is shared whole."""
        assert row not in self._groups, "only a new row is forked"
        if not self.reserve(row, tokens):
            return False
        if shared > 0:
            self._groups[row] = self._copy(self._groups[source], source, row, shared)
        return True

    def _copy(self, group: Group, source: int, row: int, shared: int) -> Group:
        index = group.rows.index(source)
        sources = group.sources[index : index + 1]
        own = shared - sum(sources)
        assert own >= 0, "a source is shared whole"
        start = group.starts[index]
        layers = [
            (keys[index, None, :, start : start + own], values[index, None, :, start : start + own])
            for keys, values in group.layers
        ]
        crossed = [
            (keys[index, None, :, : sources[0]], values[index, None, :, : sources[0]])
            for keys, values in group.crossed
        ]
        # Its columns are full: the row's first step copies it into a group of its own.
        return Group([row], [0], own, own, layers, sources, crossed)

    def release(self, row: int) -> None:
        self._reserved.pop(row, None)
        self._groups.pop(row, None)

    def order(self, rows: Sequence[int]) -> list[int]:
        """By arrival, so that the others keep their order when one leaves."""
        return sorted(rows)

    def gather(self, rows: Sequence[int], tokens: int, sources: Sequence[int] = ()) -> Group:
        """The group of exactly these rows, with columns for `tokens` more.

        `sources`: of an encoder-decoder, the length of each row's source.
        """
        group = self._groups.get(rows[0])
        if group is None or group.rows != list(rows) or group.end + tokens > group.columns:
            group = self._group(list(rows), tokens, list(sources))
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
