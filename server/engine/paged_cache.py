"""Keys and values in blocks of 256 tokens, for CUDA; a row's block table says which are its own.

Rows that begin alike can have their first whole blocks in common; blocks are counted here alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from server.engine.attention import (
    AttentionPlan,
    Chunk,
    LayerAttention,
    LayerShape,
    attend_chunk,
    causal_mask,
)
from server.engine.errors import DoesNotFit

BLOCK = 256
"""Tokens; what the paged kernel behind `varlen_attn` is built for."""
_SCRATCH_BLOCK = 0
"""Written by the padding of captured batches, read by nobody."""


class PagedCache:
    """Allocated once, on the device. Runs on any device; the kernel is chosen per layer."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        total_tokens: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """`max_tokens` is the longest row. Raises DoesNotFit where one such does not fit."""
        blocks = total_tokens // BLOCK
        self.table_width = -(-max_tokens // BLOCK)
        if blocks < self.table_width:
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set kv-cache-tokens to {self.table_width * BLOCK} or more, or max-model-len lower"
            )
        self.total_tokens = blocks * BLOCK
        self.nbytes = self.total_tokens * sum(shape.nbytes for shape in shapes)
        self.device = device
        self.keys = [
            torch.zeros(blocks + 1, BLOCK, s.kv_heads, s.key_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self.values = [
            torch.zeros(blocks + 1, BLOCK, s.kv_heads, s.value_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self._free = list(range(blocks, _SCRATCH_BLOCK, -1))
        self._users = [0] * (blocks + 1)
        """By block: the tables that it stands in."""
        self.tables: dict[int, list[int]] = {}

    @property
    def used_tokens(self) -> int:
        return self.total_tokens - len(self._free) * BLOCK

    def reserve(self, row: int, tokens: int) -> bool:
        table = self.tables.get(row, [])
        missing = -(-tokens // BLOCK) - len(table)
        if missing > len(self._free):
            return False
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
            self.tables[row] = table + new
            self._count(new, 1)
            index = torch.tensor(new, device=self.device)
            for pool in (*self.keys, *self.values):
                # What another row left there is masked, but NaN times a weight of 0 is NaN.
                pool.index_fill_(0, index, 0.0)
        return True

    def fork(self, source: int, row: int, shared: int, tokens: int) -> bool:
        assert row not in self.tables, "only a new row is forked"
        origin = self.tables[source]
        whole, rest = divmod(shared, BLOCK)
        self.tables[row] = origin[:whole]
        if not self.reserve(row, tokens):
            del self.tables[row]
            return False
        self._count(origin[:whole], 1)
        if rest:
            begun, copy = origin[whole], self.tables[row][whole]
            for pool in (*self.keys, *self.values):
                pool[copy, :rest] = pool[begun, :rest]
        return True

    def release(self, row: int) -> None:
        table = self.tables.pop(row, [])
        self._count(table, -1)
        self._free += [block for block in table if self._users[block] == 0]

    def _count(self, blocks: Sequence[int], change: int) -> None:
        for block in blocks:
            self._users[block] += change
            assert self._users[block] >= 0, "a block is released once"

    def order(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows)

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return PagedPlan(self, self.index([*decode, *prefill]), [*decode, *prefill], len(decode))

    def index(self, chunks: Sequence[Chunk]) -> "PagedIndex":
        width = max(len(self.tables[chunk.row]) for chunk in chunks)
        rows = [self.tables[chunk.row] for chunk in chunks]
        tables = torch.tensor([row + [_SCRATCH_BLOCK] * (width - len(row)) for row in rows])
        starts = torch.tensor([chunk.start for chunk in chunks])
        tokens = torch.tensor([chunk.tokens for chunk in chunks])
        cumulative = F.pad(tokens.cumsum(0), (1, 0))
        row = torch.arange(len(chunks)).repeat_interleave(tokens)
        positions = torch.arange(int(tokens.sum())) - cumulative[row] + starts[row]
        return PagedIndex(
            tables=tables.int().to(self.device),
            lengths=(starts + tokens).int().to(self.device),
            cumulative=cumulative.int().to(self.device),
            block=tables[row, positions // BLOCK].to(self.device),
            offset=(positions % BLOCK).to(self.device),
            longest_chunk=max(chunk.tokens for chunk in chunks),
            longest_row=max(chunk.start + chunk.tokens for chunk in chunks),
        )


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Where a step's `rows` chunks find their keys, on the device."""

    tables: torch.Tensor
    """`[rows, blocks]`, int32."""
    lengths: torch.Tensor
    """`[rows]`, int32: keys of each row, this step's included."""
    cumulative: torch.Tensor
    """`[rows + 1]`, int32: where each row's tokens begin in the flat batch."""
    block: torch.Tensor
    """`[tokens]`: the block that each token's key goes to."""
    offset: torch.Tensor
    """`[tokens]`: and where in it."""
    longest_chunk: int
    longest_row: int


class PagedPlan:
    def __init__(
        self, cache: PagedCache, index: PagedIndex, chunks: Sequence[Chunk], decoding: int
    ) -> None:
        """The first `decoding` of the chunks hold one token each."""
        self._cache = cache
        self._index = index
        self._chunks = chunks
        self._decoding = decoding

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        index = self._index
        keys, values = self._cache.keys[layer.layer], self._cache.values[layer.layer]
        keys[index.block, index.offset] = key.transpose(0, 1)
        values[index.block, index.offset] = value.transpose(0, 1)
        if _kernel_fits(query, value, layer):
            out = varlen_attn(
                query.transpose(0, 1).contiguous(),
                keys,
                values,
                index.cumulative,
                None,
                index.longest_chunk,
                index.longest_row,
                scale=layer.scaling,
                window_size=(-1 if layer.window is None else layer.window - 1, 0),
                enable_gqa=query.shape[0] != key.shape[0],
                seqused_k=index.lengths,
                block_table=index.tables,
            )
            assert isinstance(out, torch.Tensor)
            return out
        return self._gathered(query, keys, values, layer)

    def _gathered(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        """For what the kernel does not know (float32, soft-capping): blocks gathered, then SDPA."""
        out = query.new_empty(query.shape[1], query.shape[0], values.shape[-1])
        if self._decoding:
            out[: self._decoding] = self._decode(query[:, : self._decoding], keys, values, layer)
        start = self._decoding
        for row, chunk in enumerate(self._chunks[self._decoding :], start=self._decoding):
            span = slice(start, start + chunk.tokens)
            end = chunk.start + chunk.tokens
            table = self._index.tables[row]
            out[span] = attend_chunk(
                query[:, span],
                keys[table].flatten(0, 1)[:end].transpose(0, 1),
                values[table].flatten(0, 1)[:end].transpose(0, 1),
                causal_mask(chunk, layer.window, query.device),
                layer,
            ).transpose(0, 1)
            start += chunk.tokens
        return out

    def _decode(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        rows = query.shape[1]
        tables, lengths = self._index.tables[:rows], self._index.lengths[:rows, None]
        mine = keys[tables].flatten(1, 2).transpose(1, 2)
        kept = values[tables].flatten(1, 2).transpose(1, 2)
        times = torch.arange(mine.shape[2], device=query.device)
        seen = times < lengths
        if layer.window is not None:
            seen &= times >= lengths - layer.window
        # Query heads that share a key head: [rows, kv_heads, group, dim].
        grouped = query.transpose(0, 1).reshape(rows, mine.shape[1], -1, query.shape[-1])
        scores = torch.matmul(grouped * layer.scaling, mine.transpose(-1, -2))
        if layer.softcap is not None:
            scores = torch.tanh(scores / layer.softcap) * layer.softcap
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(kept.dtype)
        return torch.matmul(weights, kept).flatten(1, 2)


def _kernel_fits(query: torch.Tensor, value: torch.Tensor, layer: LayerAttention) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and layer.softcap is None
        and query.shape[-1] == value.shape[-1] <= 256
    )
