"""Decode steps as captured CUDA graphs, one for each size of a ladder of batch sizes."""

from collections import abc

import torch

from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.native.attention import Chunk, StepContext
from infuse.server.engine.native.cache.paged_cache import BLOCK, PagedCache, PagedIndex, PagedPlan
from infuse.server.engine.native.cache.planning import Limits
from infuse.server.engine.native.forward.tracing import Forward


class DecodeGraphs:
    """Replays captured decode steps, so that kernels are not launched one by one.

    A graph reads static buffers: tokens, positions, page tables, and the bank's row buffers, which
    hold the batch's vectors. A batch between two sizes is padded with rows that write to the
    scratch page. A new column in the bank invalidates the graphs, and they are captured again.
    """

    def __init__(
        self,
        ia3: IA3Slots,
        context: StepContext,
        cache: PagedCache,
        forward: Forward,
        limits: Limits,
    ) -> None:
        self._ia3 = ia3
        self._context = context
        self._cache = cache
        self._forward_flat = forward
        max_rows = limits.max_rows
        self._max_tokens = limits.max_tokens
        self._sizes: list[int] = [
            size for size in (1, 2, 4, 8, *range(16, max_rows, 8)) if size < max_rows
        ]
        self._sizes.append(max_rows)
        ia3.bank.reserve_rows(max_rows)
        ia3.bank.keep_active = True
        device = cache.device
        self._ids = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self._positions = torch.zeros(1, max_rows, dtype=torch.long, device=device)
        self._tables = torch.zeros(max_rows, cache.table_width, dtype=torch.int32, device=device)
        self._every = torch.arange(max_rows, device=device)
        self._cumulative = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._columns = -1
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def fit(self, decode: abc.Sequence[Chunk]) -> bool:
        return 0 < len(decode) <= self._sizes[-1]

    def run(
        self, ids: abc.Sequence[int], decode: abc.Sequence[Chunk], slots: abc.Sequence[int]
    ) -> torch.Tensor:
        """Run a decode step. Returns logits `[rows, vocab]`, which are valid until the next run."""
        rows = len(decode)
        size = next(size for size in self._sizes if size >= rows)
        padding = size - rows
        width = self._cache.table_width
        tables = [self._cache.tables[chunk.seq_id] for chunk in decode]
        self._ids[0, :size] = torch.tensor([*ids, *[0] * padding])
        self._positions[0, :size] = torch.tensor([*(c.start for c in decode), *[0] * padding])
        self._tables[:size] = torch.tensor(
            [*(table + [0] * (width - len(table)) for table in tables), *[[0] * width] * padding]
        )
        self._ia3.set_packed([*slots, *[0] * padding])
        columns = self._ia3.version.columns
        if columns != self._columns:
            self._graphs.clear()
            self._columns = columns
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    def _capture(self, size: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forward(size)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(size)
        return graph, logits

    def _forward(self, size: int) -> torch.Tensor:
        positions = self._positions[0, :size]
        tables = self._tables[:size]
        index = PagedIndex(
            tables=tables,
            lengths=(positions + 1).int(),
            cumulative=self._cumulative[: size + 1],
            page=tables.gather(1, (positions // BLOCK)[:, None])[:, 0].long(),
            offset=positions % BLOCK,
            longest_chunk=1,
            longest_row=self._max_tokens,
        )
        with self._context.step(PagedPlan(self._cache, index, [], decoding=size)):
            return self._forward_flat(
                self._ids[:, :size], self._positions[:, :size], self._every[:size]
            )
