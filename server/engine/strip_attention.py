"""Attention on the CPU over keys and values in strips: a step of decoding rows and prompts' chunks.

A layer's memory, cut into strips of one length, is one tensor; so decoding rows whose strips lie
near each other are computed as one batched product, and one operation writes all new keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.attention import Chunk, LayerAttention, attend_chunk, causal_mask

_GAP_TOKENS = 512
"""Keys of rows that do not decode, which a product computes along rather than be cut in two: about
what the operations of another product cost."""


class Strips(Protocol):
    """Where the rows' keys and values lie."""

    def place(self, row: int) -> tuple[int, int]:
        """The length of the row's strip, and its number among all strips of that length."""
        ...

    def keys(self, layer: int, length: int) -> torch.Tensor:
        """The layer's memory as strips of one length: `[strips, kv_heads, length, key_dim]`."""
        ...

    def values(self, layer: int, length: int) -> torch.Tensor:
        """`[strips, kv_heads, length, value_dim]`."""
        ...


@dataclass(frozen=True, slots=True)
class _Run:
    """Decoding rows in neighbouring strips: tokens `first` to `first + rows` of the batch."""

    first: int
    rows: int
    length: int
    """Of the strips."""
    strips: slice
    longest: int
    """Keys of the longest row, the new one included."""
    lengths: torch.Tensor
    """`[strips]`: keys that each strip's row sees; all of them in a strip between."""
    inside: torch.Tensor | None
    """`[rows]`: which of the strips are the rows'; None: all of them."""


class StripPlan:
    """One step's attention. Decoding rows come in the order of their places."""

    def __init__(self, strips: Strips, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> None:
        self._strips = strips
        self._prefill = prefill
        self._decoding = len(decode)
        self._chunks = [(chunk, *strips.place(chunk.row)) for chunk in [*decode, *prefill]]
        self._runs = _find_runs(self._chunks[: len(decode)])
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}
        self._targets: dict[int, torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        self._write(self._strips.keys, key, layer.layer)
        self._write(self._strips.values, value, layer.layer)
        if len(self._runs) == 1 and not self._prefill:
            return self._decode(self._runs[0], query, layer)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        for run in self._runs:
            span = slice(run.first, run.first + run.rows)
            out[span] = self._decode(run, query[:, span], layer)
        start = self._decoding
        for chunk, length, number in self._chunks[self._decoding :]:
            span = slice(start, start + chunk.tokens)
            end = chunk.start + chunk.tokens
            out[span] = attend_chunk(
                query[:, span],
                self._strips.keys(layer.layer, length)[number, :, :end],
                self._strips.values(layer.layer, length)[number, :, :end],
                self._chunk_mask(chunk, layer.window),
                layer,
            ).transpose(0, 1)
            start += chunk.tokens
        return out

    def _write(
        self, strips: Callable[[int, int], torch.Tensor], new: torch.Tensor, layer: int
    ) -> None:
        """Store every token's `[kv_heads, tokens, dim]` in one operation."""
        dim = new.shape[-1]
        memory = strips(layer, self._chunks[0][1]).view(-1, dim)
        memory.index_copy_(0, self._target(new.shape[0]), new.transpose(0, 1).reshape(-1, dim))

    def _target(self, kv_heads: int) -> torch.Tensor:
        """`[tokens * kv_heads]`: where each token's heads go, counted in heads of one token."""
        if kv_heads not in self._targets:
            starts: list[int] = []
            lengths: list[int] = []
            for chunk, length, number in self._chunks:
                first = number * kv_heads * length + chunk.start
                starts += range(first, first + chunk.tokens)
                lengths += [length] * chunk.tokens
            heads = torch.arange(kv_heads) * torch.tensor(lengths)[:, None]
            self._targets[kv_heads] = (torch.tensor(starts)[:, None] + heads).flatten()
        return self._targets[kv_heads]

    def _decode(self, run: _Run, query: torch.Tensor, layer: LayerAttention) -> torch.Tensor:
        """One token for each row of a run: `[heads, rows, dim]` to `[rows, heads, value_dim]`."""
        keys = self._strips.keys(layer.layer, run.length)[run.strips]
        values = self._strips.values(layer.layer, run.length)[run.strips]
        heads, kv_heads, strips = query.shape[0], keys.shape[1], keys.shape[0]
        query = query.transpose(0, 1)
        if run.inside is not None:
            query = query.new_zeros(strips, *query.shape[1:]).index_copy_(0, run.inside, query)
        # Query heads that share a key head form one small matrix.
        grouped = query.reshape(strips * kv_heads, heads // kv_heads, query.shape[-1])
        scores = _scores(
            grouped,
            keys.flatten(0, 1)[:, : run.longest].transpose(1, 2),
            self._decode_mask(run, layer.window, kv_heads, keys.dtype),
            layer,
        )
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        out = torch.bmm(weights, values.flatten(0, 1)[:, : run.longest])
        out = out.view(strips, heads, values.shape[-1])
        return out if run.inside is None else out[run.inside]

    def _decode_mask(
        self, run: _Run, window: int | None, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """`[strips * kv_heads, 1, longest]`, 0 or -inf; None where every row sees every key."""
        key = (run.first, window, kv_heads)
        if key not in self._masks:
            lengths = run.lengths[:, None]
            times = torch.arange(run.longest)
            hidden = times >= lengths
            if window is not None:
                hidden |= times < lengths - window
            mask = None
            if bool(hidden.any()):
                mask = torch.zeros(len(hidden), 1, run.longest, dtype=dtype)
                mask.masked_fill_(hidden[:, None], -torch.inf)
                mask = mask.repeat_interleave(kv_heads, dim=0)
            self._masks[key] = mask
        return self._masks[key]

    def _chunk_mask(self, chunk: Chunk, window: int | None) -> torch.Tensor | None:
        key = (chunk, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(chunk, window, torch.device("cpu"))
        return self._masks[key]


def _scores(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, layer: LayerAttention
) -> torch.Tensor:
    """`[batch, group, dim]` times `[batch, dim, time]`: `[batch, group, time]`, masked."""
    query = query * layer.scaling
    if layer.softcap is None and mask is not None:
        return torch.baddbmm(mask, query, keys)
    scores = torch.bmm(query, keys)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return scores if mask is None else scores.add_(mask)


def _find_runs(decode: Sequence[tuple[Chunk, int, int]]) -> list[_Run]:
    """`decode`: each row's one token, the length of its strip and the strip's number."""
    groups: list[list[int]] = []
    for index, (_, length, number) in enumerate(decode):
        if groups:
            _, before, last = decode[groups[-1][-1]]
            if before == length and (number - last - 1) * length <= _GAP_TOKENS:
                groups[-1].append(index)
                continue
        groups.append([index])
    return [_make_run(group[0], decode[group[0] : group[-1] + 1]) for group in groups]


def _make_run(first: int, rows: Sequence[tuple[Chunk, int, int]]) -> _Run:
    numbers = [number for _, _, number in rows]
    strips = slice(numbers[0], numbers[-1] + 1)
    longest = max(chunk.start + 1 for chunk, _, _ in rows)
    lengths = torch.full((strips.stop - strips.start,), longest)
    inside = torch.tensor(numbers) - strips.start
    lengths[inside] = torch.tensor([chunk.start + 1 for chunk, _, _ in rows])
    whole = len(numbers) == len(lengths)
    return _Run(first, len(rows), rows[0][1], strips, longest, lengths, None if whole else inside)
