"""Attention on the CPU over keys and values in strips: a step of decoding rows and prompts' chunks.

A layer's memory, cut into strips of one length, is one tensor; so decoding rows whose strips lie
near each other are computed as one batched product, and one operation writes all new keys.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from server.engine.attention import Chunk, LayerAttention, attend_chunk, causal_mask
from server.engine.kernels.attention import DecodeKernel, Dims

_GAP_TOKENS = 512
"""Keys of rows that do not decode, which a product computes along rather than be cut in two: about
what the operations of another product cost."""


class Strips(Protocol):
    """Where the rows' keys and values lie."""

    def place(self, row: int) -> tuple[int, int]:
        """The length of the row's strip, and its number among all strips of that length."""
        ...

    @property
    def key_memory(self) -> Sequence[torch.Tensor]:
        """Each layer's: `[total_tokens * kv_heads, key_dim]`, which strips of a length divide into
        `[strips, kv_heads, length, key_dim]`."""
        ...

    @property
    def value_memory(self) -> Sequence[torch.Tensor]: ...


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
    lengths: list[int]
    """Keys that each strip's row sees; all of them in a strip between."""
    inside: torch.Tensor | None
    """`[rows]`: which of the strips are the rows'; None: all of them."""


class StripPlan:
    """One step's attention. Decoding rows come in the order of their places."""

    def __init__(
        self,
        strips: Strips,
        decode: Sequence[Chunk],
        prefill: Sequence[Chunk],
        kernels: Mapping[Dims, DecodeKernel],
    ) -> None:
        self._strips = strips
        self._kernels = kernels
        self._prefill = prefill
        self._decoding = len(decode)
        self._chunks = [(chunk, *strips.place(chunk.row)) for chunk in [*decode, *prefill]]
        self._runs = _find_runs(self._chunks[: len(decode)])
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._seen: dict[int, torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        keys, values = self._strips.key_memory[layer.layer], self._strips.value_memory[layer.layer]
        target = self._target(len(key))
        keys.index_put_((target,), key)
        values.index_put_((target,), value)
        start = self._decoding
        if not self._prefill:
            return self._attend_decoding(query, keys, values, len(key), layer)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        if start:
            out[:start] = self._attend_decoding(query[:, :start], keys, values, len(key), layer)
        for chunk, length, number in self._chunks[self._decoding :]:
            span = slice(start, start + chunk.tokens)
            end = chunk.start + chunk.tokens
            strip = slice(number, number + 1)
            out[span] = attend_chunk(
                query[:, span],
                _strips(keys, strip, len(key), length, end),
                _strips(values, strip, len(key), length, end),
                self._chunk_mask(chunk, layer.window),
                layer,
            ).transpose(0, 1)
            start += chunk.tokens
        return out

    def _target(self, kv_heads: int) -> torch.Tensor:
        """`[kv_heads, tokens]`: where in a layer's memory each token's heads go."""
        if kv_heads not in self._targets:
            places: list[list[int]] = [[] for _ in range(kv_heads)]
            for chunk, length, number in self._chunks:
                start = number * kv_heads * length + chunk.start
                for head in range(kv_heads):
                    places[head] += range(start, start + chunk.tokens)
                    start += length
            self._targets[kv_heads] = torch.tensor(places)
        return self._targets[kv_heads]

    def _attend_decoding(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kv_heads: int,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """One token for each decoding row: `[heads, rows, dim]` to `[rows, heads, value_dim]`.
        `keys` and `values` are all of the layer's."""
        kernel = self._kernels.get((keys.shape[1], values.shape[1]))
        if kernel is not None and layer.softcap is None and keys.dtype == torch.float32:
            return kernel(query, keys, values, self._rows(kv_heads), kv_heads, layer)
        if len(self._runs) == 1:
            return self._decode(self._runs[0], query, keys, values, kv_heads, layer)
        parts = [
            self._decode(
                run, query[:, run.first : run.first + run.rows], keys, values, kv_heads, layer
            )
            for run in self._runs
        ]
        return torch.cat(parts)

    def _rows(self, kv_heads: int) -> torch.Tensor:
        """`[decoding rows, 3]`, as the kernel takes them."""
        if kv_heads not in self._seen:
            self._seen[kv_heads] = torch.tensor(
                [
                    (number * kv_heads * length, length, chunk.start + 1)
                    for chunk, length, number in self._chunks[: self._decoding]
                ]
            )
        return self._seen[kv_heads]

    def _decode(
        self,
        run: _Run,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        kv_heads: int,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """The same for the rows of a run, by torch's batched products."""
        heads, strips = len(query), run.strips.stop - run.strips.start
        query = query.transpose(0, 1)
        if run.inside is not None:
            query = query.new_zeros(strips, *query.shape[1:]).index_copy_(0, run.inside, query)
        # Query heads that share a key head form one small matrix.
        scores = _scores(
            query.reshape(strips * kv_heads, heads // kv_heads, -1),
            _strips(keys, run.strips, kv_heads, run.length, run.longest).transpose(1, 2),
            self._decode_mask(run, layer.window, kv_heads, keys.dtype),
            layer,
        )
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if weights.dtype != values.dtype:
            weights = weights.to(values.dtype)
        out = torch.bmm(weights, _strips(values, run.strips, kv_heads, run.length, run.longest))
        out = out.view(strips, heads, -1)
        return out if run.inside is None else out[run.inside]

    def _decode_mask(
        self, run: _Run, window: int | None, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """`[strips * kv_heads, 1, longest]`, 0 or -inf; None where every row sees every key."""
        key = (run.first, window, kv_heads)
        if key not in self._masks:
            self._masks[key] = None
            if min(run.lengths) < run.longest or (window is not None and window < run.longest):
                times = torch.arange(run.longest)
                lengths = torch.tensor([[[n]] for n in run.lengths for _ in range(kv_heads)])
                seen = times < lengths
                if window is not None:
                    seen &= times >= lengths - window
                self._masks[key] = torch.zeros(seen.shape, dtype=dtype).masked_fill_(
                    ~seen, -torch.inf
                )
        return self._masks[key]

    def _chunk_mask(self, chunk: Chunk, window: int | None) -> torch.Tensor | None:
        key = (chunk, window)
        if key not in self._masks:
            self._masks[key] = causal_mask(chunk, window, torch.device("cpu"))
        return self._masks[key]


def _strips(
    memory: torch.Tensor, strips: slice, kv_heads: int, length: int, tokens: int
) -> torch.Tensor:
    """The first tokens of neighbouring strips of one length: `[strips * kv_heads, tokens, dim]`."""
    dim = memory.shape[1]
    return memory.as_strided(
        ((strips.stop - strips.start) * kv_heads, tokens, dim),
        (length * dim, dim, 1),
        strips.start * kv_heads * length * dim,
    )


def _scores(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, layer: LayerAttention
) -> torch.Tensor:
    """`[batch, group, dim]` times `[batch, dim, time]`: `[batch, group, time]`, masked."""
    if layer.softcap is None and mask is not None:
        return torch.baddbmm(mask, query * layer.scaling, keys)
    scores = torch.bmm(query * layer.scaling, keys)
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
    lengths = [longest] * (strips.stop - strips.start)
    for chunk, _, number in rows:
        lengths[number - strips.start] = chunk.start + 1
    inside = None
    if len(numbers) < len(lengths):
        inside = torch.tensor([number - strips.start for number in numbers])
    return _Run(first, len(rows), rows[0][1], strips, longest, lengths, inside)
