"""Attention on the CPU over keys and values in strips: decoding rows and chunks of prompts.

A layer's memory, cut into strips of one length, is one tensor. So decoding rows whose strips lie
near each other are one batched matmul, and one operation writes all new keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch

from infuse.server.engine.native.attention import (
    Chunk,
    LayerAttention,
    LayerMemory,
    attend_chunk,
    causal_mask,
)
from infuse.server.engine.native.cache.slabs import Strip
from infuse.server.engine.native.kernels.attention import Kernels

_GAP_TOKENS = 512
"""Tokens of strips between decoding rows that a matmul computes in vain rather than be cut in two:
about what one more matmul costs."""


class Strips(Protocol):
    """Says where the sequences' keys and values lie."""

    def strip_of(self, seq_id: int) -> Strip: ...

    @property
    def memory(self) -> Sequence[LayerMemory]:
        """One for each layer."""
        ...


@dataclass(frozen=True, slots=True)
class _Strips:
    """Neighbouring strips of one length, as far as their first `tokens` tokens."""

    numbers: slice
    length: int
    tokens: int

    @property
    def count(self) -> int:
        return int(self.numbers.stop - self.numbers.start)

    def of(self, memory: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """View a layer's keys or values as `[strips * kv_heads, tokens, dim]`."""
        dim = memory.shape[1]
        return memory.as_strided(
            (self.count * kv_heads, self.tokens, dim),
            (self.length * dim, dim, 1),
            self.numbers.start * kv_heads * self.length * dim,
        )


@dataclass(frozen=True, slots=True)
class _Run:
    """Decoding rows in neighbouring strips, which are computed together: tokens `first` to
    `first + rows` of the batch."""

    first: int
    rows: int
    strips: _Strips
    """As many tokens of each as the longest row has, the new token included."""
    lengths: list[int]
    """For each strip, how many keys its row sees; for a strip without a decoding row, all."""
    inside: torch.Tensor | None
    """`[rows]`: the indices of the strips that have a decoding row. None: all of them have one."""


class StripPlan:
    """The attention of one step. Decoding rows come in the order of their strips."""

    def __init__(
        self,
        strips: Strips,
        decode: Sequence[Chunk],
        prefill: Sequence[Chunk],
        kernels: Kernels,
    ) -> None:
        self._strips = strips
        self._kernels = kernels
        self._prefill = prefill
        self._decoding = len(decode)
        self._chunks = [(chunk, *strips.strip_of(chunk.seq_id)) for chunk in [*decode, *prefill]]
        self._masks: dict[tuple[object, ...], torch.Tensor | None] = {}
        self._targets: dict[int, torch.Tensor] = {}
        self._kernel_chunks: dict[int, torch.Tensor] = {}

    @cached_property
    def _runs(self) -> list[_Run]:
        """The groups of decoding rows that torch computes together. Kernels do not need them."""
        return _find_runs(self._chunks[: self._decoding])

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        memory = self._strips.memory[layer.layer]
        kernel = self._kernels.get(memory.shape)
        if kernel is not None:
            chunks = self._for_kernel(memory.kv_heads)
            return kernel(query, key, value, memory, chunks, layer)
        target = self._target(memory.kv_heads)
        memory.keys.index_put_((target,), key)
        memory.values.index_put_((target,), value)
        if not self._prefill:
            return self._attend_decoding(query, memory, layer)
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        start = self._decoding
        if start:
            out[:start] = self._attend_decoding(query[:, :start], memory, layer)
        for chunk, length, number in self._chunks[self._decoding :]:
            span = slice(start, start + chunk.tokens)
            strip = _Strips(slice(number, number + 1), length, chunk.start + chunk.tokens)
            out[span] = attend_chunk(
                query[:, span],
                strip.of(memory.keys, memory.kv_heads),
                strip.of(memory.values, memory.kv_heads),
                self._chunk_mask(chunk, layer.window),
                layer,
            ).transpose(0, 1)
            start += chunk.tokens
        return out

    def bind_kernels(self) -> None:
        """Give the kernels this step's chunks, since compiled code calls them without the plan."""
        for shape, kernel in self._kernels.items():
            kernel.bind(self._for_kernel(shape.kv_heads))

    def _for_kernel(self, kv_heads: int) -> torch.Tensor:
        """`[chunks, 5]`: the step's chunks as `AttentionKernel` takes them."""
        if kv_heads not in self._kernel_chunks:
            firsts = accumulate((chunk.tokens for chunk, _, _ in self._chunks), initial=0)
            self._kernel_chunks[kv_heads] = torch.tensor(
                [
                    (number * kv_heads * length, length, chunk.start, chunk.tokens, first)
                    for (chunk, length, number), first in zip(self._chunks, firsts, strict=False)
                ]
            )
        return self._kernel_chunks[kv_heads]

    def _target(self, kv_heads: int) -> torch.Tensor:
        """`[kv_heads, tokens]`: the index in a layer's memory that each new key is written to."""
        if kv_heads not in self._targets:
            indices: list[list[int]] = [[] for _ in range(kv_heads)]
            for chunk, length, number in self._chunks:
                start = number * kv_heads * length + chunk.start
                for head in range(kv_heads):
                    indices[head] += range(start, start + chunk.tokens)
                    start += length
            self._targets[kv_heads] = torch.tensor(indices)
        return self._targets[kv_heads]

    def _attend_decoding(
        self, query: torch.Tensor, memory: LayerMemory, layer: LayerAttention
    ) -> torch.Tensor:
        """Attend for one token of each decoding row: `[heads, rows, dim]` to
        `[rows, heads, value_dim]`."""
        if len(self._runs) == 1:
            return self._decode(self._runs[0], query, memory, layer)
        parts = [
            self._decode(run, query[:, run.first : run.first + run.rows], memory, layer)
            for run in self._runs
        ]
        return torch.cat(parts)

    def _decode(
        self, run: _Run, query: torch.Tensor, memory: LayerMemory, layer: LayerAttention
    ) -> torch.Tensor:
        """Attend likewise for the rows of one run, by torch's batched matmuls."""
        heads, kv_heads = len(query), memory.kv_heads
        query = query.transpose(0, 1)
        if run.inside is not None:
            query = query.new_zeros(run.strips.count, *query.shape[1:]).index_copy_(
                0, run.inside, query
            )
        # Query heads that share a key head form one small matrix.
        scores = _scores(
            query.reshape(run.strips.count * kv_heads, heads // kv_heads, -1),
            run.strips.of(memory.keys, kv_heads).transpose(1, 2),
            self._decode_mask(run, layer.window, kv_heads, memory.keys.dtype),
            layer,
        )
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
        if weights.dtype != memory.values.dtype:
            weights = weights.to(memory.values.dtype)
        out = torch.bmm(weights, run.strips.of(memory.values, kv_heads))
        out = out.view(run.strips.count, heads, -1)
        return out if run.inside is None else out[run.inside]

    def _decode_mask(
        self, run: _Run, window: int | None, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """`[strips * kv_heads, 1, longest]`, 0 or -inf. None: every row sees every key."""
        key = (run.first, window, kv_heads)
        if key not in self._masks:
            self._masks[key] = None
            longest = run.strips.tokens
            if min(run.lengths) < longest or (window is not None and window < longest):
                times = torch.arange(longest)
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


def _scores(
    query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, layer: LayerAttention
) -> torch.Tensor:
    """Multiply `[batch, group, dim]` by `[batch, dim, time]` and mask: `[batch, group, time]`."""
    if layer.softcap is None and mask is not None:
        return torch.baddbmm(mask, query * layer.scaling, keys)
    scores = torch.bmm(query * layer.scaling, keys)
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return scores if mask is None else scores.add_(mask)


def _find_runs(decode: Sequence[tuple[Chunk, int, int]]) -> list[_Run]:
    """Group neighbouring rows. `decode`: for each row its one token, and its strip's length and
    number."""
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
    longest = max(chunk.start + 1 for chunk, _, _ in rows)
    strips = _Strips(slice(numbers[0], numbers[-1] + 1), rows[0][1], longest)
    lengths = [longest] * strips.count
    for chunk, _, number in rows:
        lengths[number - numbers[0]] = chunk.start + 1
    inside = None
    if len(numbers) < len(lengths):
        inside = torch.tensor([number - numbers[0] for number in numbers])
    return _Run(first, len(rows), strips, lengths, inside)
