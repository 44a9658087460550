"""Keys and values of all rows in a fixed budget of tokens, allocated once.

`StripCache` is for the CPU: a row's keys lie in one strip, and rows in strips of one length lie
side by side, so that their attention is one batched matrix product. `PagedCache`
(`paged_cache.py`) is for CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from server.engine.attention import AttentionPlan, LayerAttention, LayerShape
from server.engine.errors import DoesNotFit

SMALLEST_STRIP = 64
"""Tokens."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + tokens` of a row, computed in one step."""

    row: int
    start: int
    tokens: int


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
        self._empty = list(range(slabs))
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
        places = self._places
        return sorted(rows, key=lambda row: (places[row].slab, places[row].index))

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return _StripPlan(self, decode, prefill)

    def place(self, row: int) -> tuple[int, int]:
        """The row's slab, and which strip of the slab."""
        place = self._places[row]
        return place.slab, place.index

    def keys(self, layer: int, slab: int) -> torch.Tensor:
        """`[strips, kv_heads, strip, key_dim]`."""
        shape = self._shapes[layer]
        strip = self._slabs[slab][0]
        return self._keys[layer][slab].view(-1, shape.kv_heads, strip, shape.key_dim)

    def values(self, layer: int, slab: int) -> torch.Tensor:
        """`[strips, kv_heads, strip, value_dim]`."""
        shape = self._shapes[layer]
        strip = self._slabs[slab][0]
        return self._values[layer][slab].view(-1, shape.kv_heads, strip, shape.value_dim)

    def _take_strip(self, row: int, tokens: int, origin: _Place | None, kept: int) -> bool:
        """Give the row another strip; its first `kept` tokens are copied from `origin`."""
        place = self._find_place(tokens)
        if place is None:
            return False
        self._slabs[place.slab][1][place.index] = True
        for layer in range(len(self._shapes)):
            for strips in (self.keys, self.values):
                strip = strips(layer, place.slab)[place.index]
                # What another row left there is masked, but NaN times a weight of 0 is NaN.
                strip[:, kept:].zero_()
                if origin is not None:
                    strip[:, :kept].copy_(strips(layer, origin.slab)[origin.index][:, :kept])
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


@dataclass(slots=True)
class _Run:
    """Decoding rows in neighbouring strips of one slab: tokens `first` to `first + rows`."""

    first: int
    rows: int
    slab: int
    strip: int
    lengths: list[int]
    """Keys of each row, the new one included."""
    index: torch.Tensor
    """`[rows]`: the strips."""
    positions: torch.Tensor
    """`[rows]`: where the new keys go."""


class _StripPlan:
    def __init__(
        self, cache: StripCache, decode: Sequence[Chunk], prefill: Sequence[Chunk]
    ) -> None:
        self._cache = cache
        self._runs = self._find_runs(decode)
        self._prefill = prefill
        self._decoding = len(decode)
        self._masks: dict[tuple[int, int | None], torch.Tensor | None] = {}

    def _find_runs(self, decode: Sequence[Chunk]) -> list[_Run]:
        groups: list[tuple[int, int, list[int]]] = []
        for chunk in decode:
            slab, index = self._cache.place(chunk.row)
            if groups and groups[-1][0] == slab and groups[-1][1] + len(groups[-1][2]) == index:
                groups[-1][2].append(chunk.start)
            else:
                groups.append((slab, index, [chunk.start]))
        runs = []
        first = 0
        for slab, first_strip, starts in groups:
            rows = len(starts)
            strips = torch.arange(first_strip, first_strip + rows)
            lengths = [start + 1 for start in starts]
            runs.append(_Run(first, rows, slab, first_strip, lengths, strips, torch.tensor(starts)))
            first += rows
        return runs

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[-1])
        for run in self._runs:
            span = slice(run.first, run.first + run.rows)
            out[span] = self._decode(run, query[:, span], key[:, span], value[:, span], layer)
        start = self._decoding
        for number, chunk in enumerate(self._prefill):
            span = slice(start, start + chunk.tokens)
            out[span] = self._prefill_chunk(
                number, chunk, query[:, span], key[:, span], value[:, span], layer
            ).transpose(0, 1)
            start += chunk.tokens
        return out

    def _decode(
        self,
        run: _Run,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """One token for each row of a run; returns `[rows, heads, value_dim]`."""
        keys = self._cache.keys(layer.layer, run.slab)
        values = self._cache.values(layer.layer, run.slab)
        keys[run.index, :, run.positions] = key.transpose(0, 1)
        values[run.index, :, run.positions] = value.transpose(0, 1)
        longest = max(run.lengths)
        here = slice(run.strip, run.strip + run.rows)
        keys = keys[here].flatten(0, 1)[:, :longest]
        values = values[here].flatten(0, 1)[:, :longest]
        kv_heads = key.shape[0]
        # Query heads that share a key head form one small matrix: [rows * kv_heads, group, dim].
        grouped = query.transpose(0, 1).reshape(
            run.rows * kv_heads, query.shape[0] // kv_heads, query.shape[-1]
        )
        scores = torch.bmm(grouped * layer.scaling, keys.transpose(1, 2))
        if layer.softcap is not None:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        mask = self._decode_mask(run, layer.window, kv_heads, scores.dtype)
        if mask is not None:
            scores += mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        return torch.bmm(weights, values).view(run.rows, query.shape[0], values.shape[-1])

    def _decode_mask(
        self, run: _Run, window: int | None, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """`[rows * kv_heads, 1, longest]`, 0 or -inf; None where every row sees every key."""
        key = (run.first, window)
        if key not in self._masks:
            longest = max(run.lengths)
            lengths = torch.tensor(run.lengths)[:, None]
            times = torch.arange(longest)
            hidden = times >= lengths
            if window is not None:
                hidden |= times < lengths - window
            mask = None
            if bool(hidden.any()):
                mask = torch.zeros(run.rows, 1, longest, dtype=dtype)
                mask.masked_fill_(hidden[:, None], -torch.inf)
                mask = mask.repeat_interleave(kv_heads, dim=0)
            self._masks[key] = mask
        return self._masks[key]

    def _prefill_chunk(
        self,
        number: int,
        chunk: Chunk,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """All tokens of one chunk; returns `[heads, tokens, value_dim]`."""
        slab, index = self._cache.place(chunk.row)
        end = chunk.start + chunk.tokens
        keys = self._cache.keys(layer.layer, slab)[index, :, :end]
        values = self._cache.values(layer.layer, slab)[index, :, :end]
        keys[:, chunk.start :] = key
        values[:, chunk.start :] = value
        mask_key = (-1 - number, layer.window)
        if mask_key not in self._masks:
            self._masks[mask_key] = causal_mask(chunk, layer.window, query.device)
        return attend_chunk(query, keys, values, self._masks[mask_key], layer)


def causal_mask(chunk: Chunk, window: int | None, device: torch.device) -> torch.Tensor | None:
    """`[tokens, start + tokens]`, true where a token sees a key; None for the plain triangle."""
    end = chunk.start + chunk.tokens
    if chunk.start == 0 and (window is None or window >= end):
        return None
    queries = torch.arange(chunk.start, end, device=device)[:, None]
    keys = torch.arange(end, device=device)
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen


def attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    layer: LayerAttention,
) -> torch.Tensor:
    """`[heads, tokens, dim]` over keys `[kv_heads, time, dim]`: `[heads, tokens, value_dim]`."""
    if layer.softcap is None:
        out: torch.Tensor = F.scaled_dot_product_attention(
            query[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=layer.scaling,
            enable_gqa=query.shape[0] != keys.shape[0],
        )[0]
        return out
    if mask is None:
        mask = torch.ones(query.shape[1], keys.shape[1], dtype=torch.bool, device=query.device)
        mask = mask.tril()
    groups = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = torch.bmm(query, keys.transpose(1, 2)) * layer.scaling
    scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values)
