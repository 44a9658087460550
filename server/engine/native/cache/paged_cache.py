"""The KV cache in pages of 256 tokens, for CUDA. A sequence's page table lists its pages.

Sequences that begin alike share their first whole pages with each other and with the prefix cache.
Only this module counts a page's users.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import (
    AttentionPlan,
    Chunk,
    LayerAttention,
    LayerShape,
    attend_chunk,
    causal_mask,
)

BLOCK = 256
"""Tokens of a page, and of a block of the prefix cache. The kernel behind `varlen_attn` requires
this size."""
_SCRATCH_PAGE = 0
"""The page that the padding rows of captured CUDA graphs write to. Nothing reads it."""


class PagedCache:
    """A KV cache of pages, allocated once. It runs on any device; each layer takes `varlen_attn`
    or, where that does not fit, torch's other operators."""

    shares = True

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        device: torch.device,
        *,
        total_tokens: int,
        max_tokens: int,
    ) -> None:
        """`max_tokens` is the length of the longest sequence. Raises DoesNotFit if that does not
        fit."""
        pages = total_tokens // BLOCK
        self.table_width = -(-max_tokens // BLOCK)
        if pages < self.table_width:
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set --kv-cache-tokens to {self.table_width * BLOCK} or more, or "
                "--max-model-len lower"
            )
        self.total_tokens = pages * BLOCK
        self.nbytes = self.total_tokens * sum(shape.nbytes for shape in shapes)
        self.device = device
        self.keys = [
            torch.zeros(pages + 1, BLOCK, s.kv_heads, s.key_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self.values = [
            torch.zeros(pages + 1, BLOCK, s.kv_heads, s.value_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self._free = list(range(pages, _SCRATCH_PAGE, -1))
        self._users = [0] * (pages + 1)
        """For each page, how many page tables and blocks use it."""
        self.tables: dict[int, list[int]] = {}
        """Sequence -> its page table."""
        self.blocks = PagedBlocks(self)

    @property
    def used_tokens(self) -> int:
        return self.total_tokens - len(self._free) * BLOCK - self.blocks.tokens

    def reserve(self, seq_id: int, tokens: int) -> bool:
        table = self.tables.get(seq_id, [])
        missing = -(-tokens // BLOCK) - len(table)
        if missing > len(self._free):
            return False
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
            self.tables[seq_id] = table + new
            self.count(new, 1)
            index = torch.tensor(new, device=self.device)
            for pool in (*self.keys, *self.values):
                # Another sequence's values there are masked, but NaN times a weight of 0 is NaN.
                pool.index_fill_(0, index, 0.0)
        return True

    def begin(self, seq_id: int, blocks: Sequence[int], *, shared: int, tokens: int) -> bool:
        assert seq_id not in self.tables, "only a new sequence begins"
        origin = self.blocks.pages(blocks)
        whole, rest = divmod(shared, BLOCK)
        self.tables[seq_id] = origin[:whole]
        if not self.reserve(seq_id, tokens):
            del self.tables[seq_id]
            return False
        self.count(origin[:whole], 1)
        if rest:
            source, target = origin[whole], self.tables[seq_id][whole]
            for pool in (*self.keys, *self.values):
                pool[target, :rest] = pool[source, :rest]
        return True

    def release(self, seq_id: int) -> None:
        self.count(self.tables.pop(seq_id, []), -1)

    def count(self, pages: Sequence[int], change: int) -> None:
        """Change the number of users of these pages. A page without users becomes free."""
        for page in pages:
            self._users[page] += change
            assert self._users[page] >= 0, "a page is released once"
            if self._users[page] == 0:
                self._free.append(page)

    def users(self, page: int) -> int:
        return self._users[page]

    def order(self, seq_ids: Sequence[int]) -> list[int]:
        return sorted(seq_ids)

    def plan(self, decode: Sequence[Chunk], prefill: Sequence[Chunk]) -> AttentionPlan:
        return PagedPlan(self, self.index([*decode, *prefill]), [*decode, *prefill], len(decode))

    def attention_call(self, _layer: LayerAttention) -> None:
        return None

    def index(self, chunks: Sequence[Chunk]) -> "PagedIndex":
        width = max(len(self.tables[chunk.seq_id]) for chunk in chunks)
        pages = [self.tables[chunk.seq_id] for chunk in chunks]
        tables = torch.tensor([each + [_SCRATCH_PAGE] * (width - len(each)) for each in pages])
        starts = torch.tensor([chunk.start for chunk in chunks])
        tokens = torch.tensor([chunk.tokens for chunk in chunks])
        cumulative = F.pad(tokens.cumsum(0), (1, 0))
        row = torch.arange(len(chunks)).repeat_interleave(tokens)
        positions = torch.arange(int(tokens.sum())) - cumulative[row] + starts[row]
        return PagedIndex(
            tables=tables.int().to(self.device),
            lengths=(starts + tokens).int().to(self.device),
            cumulative=cumulative.int().to(self.device),
            page=tables[row, positions // BLOCK].to(self.device),
            offset=(positions % BLOCK).to(self.device),
            longest_chunk=max(chunk.tokens for chunk in chunks),
            longest_row=max(chunk.start + chunk.tokens for chunk in chunks),
        )


class PagedBlocks:
    """Blocks of `PagedCache`. A block is a page that is counted once more: nothing is copied."""

    size = BLOCK

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self._pages: dict[int, int] = {}
        """Block -> its page."""
        self._kept: Counter[int] = Counter()
        """Page -> how many blocks it is: two where its sequence went on writing after the first."""
        self._numbers = count()

    @property
    def tokens(self) -> int:
        return sum(self._is_alone(page) for page in list(self._kept)) * BLOCK

    def keep(self, seq_id: int, *, start: int, tokens: int) -> list[int]:
        pages = self._cache.tables[seq_id][start // BLOCK : -(-(start + tokens) // BLOCK)]
        self._cache.count(pages, 1)
        self._kept.update(pages)
        blocks = [next(self._numbers) for _ in pages]
        self._pages.update(zip(blocks, pages, strict=True))
        return blocks

    def detach(self, _row: int, /) -> list[int]:
        return []

    def is_detached(self, block: int) -> bool:
        return self._is_alone(self._pages[block])

    def drop(self, block: int) -> None:
        page = self._pages.pop(block)
        self._cache.count([page], -1)
        self._kept[page] -= 1
        if not self._kept[page]:
            del self._kept[page]

    def to_evict(self, blocks: Iterable[int]) -> Sequence[int]:
        first = next((b for b in blocks if self._is_alone(self._pages[b])), None)
        if first is None:
            return []
        return [first]

    def pages(self, blocks: Sequence[int]) -> list[int]:
        return [self._pages[block] for block in blocks]

    def _is_alone(self, page: int) -> bool:
        """Whether only blocks, and no sequence, use a page."""
        return self._cache.users(page) == self._kept[page]


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Tensors on the device that tell the kernel where a step's chunks have their keys."""

    tables: torch.Tensor
    """`[rows, pages]`, int32: each row's page table."""
    lengths: torch.Tensor
    """`[rows]`, int32: how many keys each row has, this step's included."""
    cumulative: torch.Tensor
    """`[rows + 1]`, int32: where each row's tokens begin in the flat batch."""
    page: torch.Tensor
    """`[tokens]`: the page that each token's key is written to."""
    offset: torch.Tensor
    """`[tokens]`: the token's index in that page."""
    longest_chunk: int
    longest_row: int


class PagedPlan:
    """The attention of one step over pages."""

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
        keys[index.page, index.offset] = key.transpose(0, 1)
        values[index.page, index.offset] = value.transpose(0, 1)
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
        """Gather the pages and attend by SDPA: for float32 and soft-capping, which the kernel does
        not support."""
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
