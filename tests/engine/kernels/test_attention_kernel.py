"""Attention by our kernel, for heads of any size; the rest of what it does is in test_caches.py."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.server.engine.native.attention import Chunk, LayerAttention, LayerShape
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.kernels.attention import attention_kernels

HEADS, KV_HEADS, LONGEST = 6, 2, 2048
DIMS = [(16, 16), (24, 40), (64, 64), (128, 96)]
SHAPES = [
    *(LayerShape(KV_HEADS, *dims, torch.float32) for dims in DIMS),
    *(LayerShape(KV_HEADS, *dims, torch.bfloat16) for dims in DIMS[1:3]),
]


def random_heads(shape: LayerShape, tokens: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Queries, keys and values, `[heads, tokens, dim]`, in the shape's dtype."""
    return [
        torch.randn(count, tokens, dim, generator=generator).to(shape.dtype)
        for count, dim in (
            (HEADS, shape.key_dim),
            (KV_HEADS, shape.key_dim),
            (KV_HEADS, shape.value_dim),
        )
    ]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[StripCache, StripCache]:
    """One that attends by kernels, and one by torch, in float32."""
    kernels = attention_kernels(SHAPES, tmp_path_factory.mktemp("kernels"))
    wide = [replace(shape, dtype=torch.float32) for shape in SHAPES]
    size = {"total_tokens": 8 * LONGEST, "max_tokens": LONGEST}
    return StripCache(SHAPES, **size, kernels=kernels), StripCache(wide, **size)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[str(s) for s in SHAPES])
@settings(max_examples=15)
@given(
    starts=st.lists(st.integers(1, 1500), max_size=3),
    prompts=st.lists(st.tuples(st.integers(0, 1500), st.integers(2, 150)), max_size=3),
    window=st.one_of(st.none(), st.integers(1, 700)),
    softcap=st.one_of(st.none(), st.floats(0.5, 30)),
)
def test_it_gives_what_torch_does(
    caches: tuple[StripCache, StripCache],
    number: int,
    starts: list[int],
    prompts: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
) -> None:
    torch.manual_seed(0)
    spans = [(start, 1) for start in starts] + prompts
    if not spans:
        return
    chunks = [
        Chunk(seq_id=seq_id, start=start, tokens=tokens)
        for seq_id, (start, tokens) in enumerate(spans)
    ]
    shape = SHAPES[number]
    layer = LayerAttention(number, 0.2, window, softcap)
    past = [replace(chunk, start=0, tokens=chunk.start) for chunk in chunks if chunk.start]
    found = []
    for each, dtype in zip(caches, (shape.dtype, torch.float32), strict=True):
        for chunk in chunks:
            assert each.reserve(chunk.seq_id, chunk.start + chunk.tokens)
        order = each.order(list(range(len(starts))))
        decode, prefill = [chunks[seq_id] for seq_id in order], chunks[len(starts) :]
        generator = torch.Generator().manual_seed(1)
        for step in ((), past), (decode, prefill):
            tokens = sum(chunk.tokens for part in step for chunk in part)
            heads = [each.to(dtype) for each in random_heads(shape, tokens, generator)]
            if tokens:
                found.append(each.plan(*step).attend(*heads, layer))
        for chunk in chunks:
            each.release(chunk.seq_id)
    by_kernel, by_torch = found[: len(found) // 2], found[len(found) // 2 :]
    for mine, wanted in zip(by_kernel, by_torch, strict=True):
        error = max(1e-4, torch.finfo(shape.dtype).eps)
        torch.testing.assert_close(mine.float(), wanted, atol=2e-5, rtol=error)


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[str(s) for s in SHAPES])
@settings(max_examples=15)
@given(
    cuts=st.sets(st.integers(1, 1199), min_size=1, max_size=8),
    window=st.one_of(st.none(), st.integers(1, 700)),
    softcap=st.one_of(st.none(), st.floats(0.5, 30)),
)
def test_a_token_gets_the_same_to_the_bit_in_any_chunk(
    caches: tuple[StripCache, StripCache],
    number: int,
    cuts: set[int],
    window: int | None,
    softcap: float | None,
) -> None:
    """Also alone, as a decoding row: what was computed of a prompt before changes nothing."""
    generator = torch.Generator().manual_seed(0)
    cache, shape = caches[0], SHAPES[number]
    layer = LayerAttention(number, 0.2, window, softcap)
    edges = sorted({0, 1200, *cuts, *(cut + 1 for cut in cuts)})
    heads = random_heads(shape, edges[-1], generator)
    assert cache.reserve(0, edges[-1])
    whole = cache.plan([], [Chunk(seq_id=0, start=0, tokens=edges[-1])]).attend(*heads, layer)
    cache.release(0)
    assert cache.reserve(0, edges[-1])
    parts = []
    for start, end in pairwise(edges):
        part = [Chunk(seq_id=0, start=start, tokens=end - start)]
        plan = cache.plan(part, []) if end - start == 1 else cache.plan([], part)
        parts.append(plan.attend(*(each[:, start:end] for each in heads), layer))
    cache.release(0)
    assert torch.equal(torch.cat(parts), whole)
