"""Both caches, and the kernel, give the attention of whole rows, however rows come, grow and go."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import Chunk, LayerAttention, LayerShape
from infuse.server.engine.native.cache.kv_cache import SMALLEST_STRIP, FlatCache, StripCache
from infuse.server.engine.native.cache.paged_cache import BLOCK, PagedCache
from infuse.server.engine.native.kernels.attention import Kernels, attention_kernels

HEADS, KV_HEADS, DIM = 4, 2, 8
SHAPES = [LayerShape(KV_HEADS, DIM, DIM, torch.float32)] * 2
LONGEST = 512
ATTENTION = nn.Module().eval()
ATTENTION.num_key_value_groups = HEADS // KV_HEADS


def strips(tokens: int = 4 * LONGEST) -> FlatCache:
    return StripCache(SHAPES, total_tokens=tokens, max_tokens=LONGEST)


@cache
def kernels() -> Kernels:
    with tempfile.TemporaryDirectory() as folder:
        return attention_kernels(SHAPES, Path(folder))


def strips_by_kernel(tokens: int = 4 * LONGEST) -> FlatCache:
    return StripCache(SHAPES, total_tokens=tokens, max_tokens=LONGEST, kernels=kernels())


def blocks(tokens: int = 4 * LONGEST) -> FlatCache:
    return PagedCache(SHAPES, torch.device("cpu"), total_tokens=tokens, max_tokens=LONGEST)


CACHES = pytest.mark.parametrize("make", [strips, strips_by_kernel, blocks])


@dataclass
class Row:
    """The oracle's copy of a row: all queries, keys and values so far, `[heads, tokens, dim]`."""

    number: int
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)
    value: list[torch.Tensor] = field(default_factory=list)

    @property
    def history(self) -> tuple[list[torch.Tensor], ...]:
        return self.query, self.key, self.value

    @property
    def length(self) -> int:
        return sum(each.shape[1] for each in self.key)

    def attention(self, layer: LayerAttention, last: int) -> torch.Tensor:
        """`[last, heads, dim]`: what transformers' own attention (gemma2's) says of the last
        tokens."""
        query, key, value = (torch.cat(each, dim=1)[None] for each in self.history)
        times = torch.arange(self.length)
        past = times[:, None] - times
        hidden = (past < 0) | (past >= (layer.window or self.length))
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
        out, _ = eager_attention_forward(
            ATTENTION, query, key, value, mask, scaling=layer.scaling, softcap=layer.softcap
        )
        return out[0, -last:]


def run_step(
    cache: FlatCache, decode: list[Row], prefill: list[tuple[Row, int]], layer: LayerAttention
) -> None:
    """Attend to new random tokens of these rows and compare with the oracle."""
    by_number = {row.number: row for row in decode}
    ordered = [by_number[number] for number in cache.order(list(by_number))]
    batch = [*((row, 1) for row in ordered), *prefill]
    chunks = [Chunk(seq_id=row.number, start=row.length, tokens=n) for row, n in batch]
    plan = cache.plan(chunks[: len(decode)], chunks[len(decode) :])
    total = sum(tokens for _, tokens in batch)
    query = torch.randn(HEADS, total, DIM)
    key, value = torch.randn(2, KV_HEADS, total, DIM)
    found = plan.attend(query, key, value, layer)
    start = 0
    for row, tokens in batch:
        span = slice(start, start + tokens)
        row.query.append(query[:, span])
        row.key.append(key[:, span])
        row.value.append(value[:, span])
        torch.testing.assert_close(found[span], row.attention(layer, tokens), atol=2e-5, rtol=1e-4)
        start += tokens


LAYERS = {
    "plain": LayerAttention(layer=1, scaling=0.3),
    "sliding window": LayerAttention(layer=0, scaling=0.3, window=5),
    "soft-capping": LayerAttention(layer=0, scaling=0.9, softcap=2.0),
    "both": LayerAttention(layer=1, scaling=0.9, window=70, softcap=2.0),
}


@CACHES
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@settings(max_examples=12)
@given(plan=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=9))
def test_attention_equals_transformers_over_whole_rows(
    make: Callable[[], FlatCache], layer: LayerAttention, plan: list[tuple[int, int]]
) -> None:
    """Each entry is a step: a chunk for one row, one token for each row that has begun."""
    torch.manual_seed(0)
    cache = make()
    rows = {number: Row(number) for number in range(4)}
    for number, tokens in plan:
        decoding = [row for row in rows.values() if row.length and row.number != number]
        for row in decoding:
            assert cache.reserve(row.number, row.length + 1)
        assert cache.reserve(number, rows[number].length + tokens)
        run_step(cache, decoding, [(rows[number], tokens)], layer)


@CACHES
def test_room_is_kept_used_up_and_given_back(make: Callable[[int], FlatCache]) -> None:
    cache = make(2 * LONGEST)
    assert cache.reserve(0, LONGEST)
    assert cache.reserve(1, LONGEST)
    assert not cache.reserve(2, 1)
    cache.release(0)
    assert cache.reserve(2, LONGEST)
    cache.release(1)
    cache.release(2)
    cache.release(7)

    assert cache.used_tokens == 0


@CACHES
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@settings(max_examples=8)
@given(computed=st.integers(2, 400), share=st.floats(0, 1), more=st.integers(1, 90))
def test_a_fork_attends_as_if_it_had_computed_everything_itself(
    make: Callable[[], FlatCache], layer: LayerAttention, computed: int, share: float, more: int
) -> None:
    """Whatever either row does after it, and another one that begins when the source has gone."""
    torch.manual_seed(0)
    cache = make()
    source, fork, late = Row(0), Row(1), Row(2)
    assert cache.reserve(0, computed + more + 1)
    run_step(cache, [], [(source, computed)], layer)
    blocks = cache.blocks.keep(0, start=0, tokens=computed)
    assert cache.blocks.tokens == 0
    shared = max(1, int(share * computed))
    first = blocks[: -(-shared // (cache.blocks.size or 1))]

    def begin(row: Row) -> None:
        assert cache.begin(row.number, first, shared=shared, tokens=shared + 1)
        for mine, theirs in zip(row.history, source.history, strict=True):
            mine.append(torch.cat(theirs, dim=1)[:, :shared])

    begin(fork)
    run_step(cache, [], [(source, more), (fork, 1)], layer)
    assert cache.reserve(1, shared + more + 3)
    run_step(cache, [source], [(fork, more)], layer)
    assert cache.blocks.detach(0) == []
    cache.release(0)
    begin(late)
    run_step(cache, [fork], [(late, 1)], layer)
    assert cache.reserve(3, 70)
    run_step(cache, [fork], [(Row(3), 70)], layer)
    for row in (1, 2, 3):
        cache.release(row)
    assert (cache.used_tokens, cache.blocks.tokens >= computed) == (0, True)
    for block in blocks:
        cache.blocks.drop(block)
    assert cache.blocks.tokens == 0


@CACHES
def test_a_fork_that_finds_no_room_takes_none(make: Callable[[int], FlatCache]) -> None:
    cache = make(2 * LONGEST)
    assert cache.reserve(0, LONGEST)
    assert cache.reserve(1, LONGEST - BLOCK)
    used = cache.used_tokens
    blocks = cache.blocks.keep(0, start=0, tokens=BLOCK // 2)

    assert not cache.begin(2, blocks, shared=BLOCK // 2, tokens=LONGEST)
    assert cache.used_tokens == used


@CACHES
def test_what_a_row_leaves_behind_never_reaches_the_next(make: Callable[[], FlatCache]) -> None:
    """Not even where it was NaN, which no mask of weight 0 would hold back."""
    torch.manual_seed(0)
    cache = make()
    cache.reserve(0, 60)
    poison = torch.full((KV_HEADS, 60, DIM), torch.nan)
    cache.plan([], [Chunk(seq_id=0, start=0, tokens=60)]).attend(
        torch.randn(HEADS, 60, DIM), poison, poison, LAYERS["plain"]
    )
    cache.release(0)
    rows = [Row(1), Row(2)]
    for row in rows:
        cache.reserve(row.number, 50)
    run_step(cache, [], [(rows[0], 3), (rows[1], 40)], LAYERS["plain"])
    run_step(cache, rows, [], LAYERS["plain"])


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.one_of(st.none(), st.integers(1, LONGEST))), max_size=40
    )
)
def test_strips_never_overlap_and_never_leak(
    moves: list[tuple[int, int | None]],
) -> None:
    cache = StripCache(SHAPES[:1], total_tokens=3 * LONGEST, max_tokens=LONGEST)
    lengths: dict[int, int] = {}
    for row, tokens in moves:
        if tokens is None:
            cache.release(row)
            lengths.pop(row, None)
        elif cache.reserve(row, tokens):
            lengths[row] = max(lengths.get(row, 0), tokens)
        for number in lengths:
            length, index = cache.strip_of(number)
            cache.keys(0, length)[index].fill_(number)
        for number, length in lengths.items():
            length, index = cache.strip_of(number)
            strip = cache.keys(0, length)[index]
            assert strip.shape[1] >= length
            assert (strip == number).all()
    for row in list(lengths):
        cache.release(row)
    assert cache.used_tokens == 0
    assert all(cache.reserve(row, LONGEST) for row in range(3))


@pytest.mark.parametrize(("make", "least"), [(strips, 2 * LONGEST), (blocks, LONGEST)])
def test_a_budget_too_small_for_the_window_says_what_would_do(
    make: Callable[[int], FlatCache], least: int
) -> None:
    with pytest.raises(DoesNotFit, match=f"kv-cache-tokens to {least}"):
        make(least - 1)
    assert make(least).total_tokens == least


def test_a_table_grows_by_whole_blocks() -> None:
    cache = blocks()
    cache.reserve(0, 1)
    assert cache.used_tokens == BLOCK
    cache.reserve(0, BLOCK + 1)
    assert cache.used_tokens == 2 * BLOCK


def test_rows_that_begin_alike_have_whole_blocks_in_common() -> None:
    cache = blocks()
    cache.reserve(0, 2 * BLOCK)
    kept = cache.blocks.keep(0, start=0, tokens=BLOCK + 10)
    assert cache.begin(1, kept, shared=BLOCK + 10, tokens=2 * BLOCK)
    assert cache.used_tokens == 3 * BLOCK
    cache.release(0)
    assert (cache.used_tokens, cache.blocks.tokens) == (2 * BLOCK, BLOCK)
    assert cache.begin(2, kept[:1], shared=BLOCK, tokens=BLOCK + 1)
    cache.release(1)
    cache.release(2)
    assert (cache.used_tokens, cache.blocks.tokens) == (0, 2 * BLOCK)
    assert not cache.reserve(3, 4 * LONGEST - BLOCK)
    assert cache.blocks.to_evict(kept) == kept[:1]
    cache.blocks.drop(kept[0])
    assert cache.reserve(3, 4 * LONGEST - BLOCK)


def test_a_slabs_blocks_go_together_before_a_row_wastes_a_longer_strip() -> None:
    cache = strips(2 * LONGEST)
    size = cache.blocks.size or 0
    cache.reserve(0, LONGEST)
    kept = cache.blocks.keep(0, start=0, tokens=LONGEST)
    cache.release(7)
    assert cache.blocks.detach(0) == []
    cache.release(0)
    cache.reserve(1, LONGEST)

    assert (cache.used_tokens, cache.blocks.tokens) == (LONGEST, LONGEST)
    assert not cache.reserve(2, SMALLEST_STRIP)
    assert list(cache.blocks.to_evict(kept)) == kept
    for block in kept[1:]:
        cache.blocks.drop(block)
    assert not cache.reserve(2, SMALLEST_STRIP)
    assert cache.blocks.tokens == size
    cache.blocks.drop(kept[0])
    assert cache.reserve(2, SMALLEST_STRIP)


@CACHES
def test_a_row_that_never_had_room_can_go(make: Callable[[], FlatCache]) -> None:
    cache = make()

    assert cache.blocks.detach(0) == []
    cache.release(0)


def test_blocks_of_a_row_that_goes_stay_as_far_as_there_is_room() -> None:
    cache = strips(2 * LONGEST)
    cache.reserve(0, LONGEST)
    cache.reserve(1, LONGEST // 2)
    kept = cache.blocks.keep(0, start=0, tokens=LONGEST)

    assert cache.blocks.detach(0) == kept
    cache.release(1)
    assert cache.blocks.detach(0) == []
    assert cache.blocks.tokens == LONGEST
