"""Rows begin with what is known of them, are kept and go, in any order; nothing mixes or leaks."""

from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.kv_cache import KVCache, StripCache
from infuse.server.engine.native.cache.paged_cache import PagedCache
from infuse.server.engine.native.scheduling.prefix_cache import PrefixCache


class CacheMachine(RuleBasedStateMachine):
    """A token's key is its content's and its own number, so that a row can be checked."""

    window = 256
    token = st.integers(5, 6)
    rows_there = precondition(lambda self: self.rows)

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = self.make()
        self.known = PrefixCache(self.cache.blocks)
        self.rows: dict[int, tuple[int, list[int]]] = {}
        self.next = 0

    def make(self) -> KVCache:
        return StripCache(
            [LayerShape(1, 1, 1, torch.float32)],
            total_tokens=3 * self.window,
            max_tokens=self.window,
        )

    def keys(self, row: int) -> torch.Tensor:
        length, index = self.cache.strip_of(row)
        keys: torch.Tensor = self.cache.keys(0, length)[index, 0, :, 0]
        return keys

    def write(self, row: int, keys: list[int]) -> None:
        self.keys(row)[: len(keys)] = torch.tensor(keys, dtype=torch.float32)

    def read(self, row: int, tokens: int) -> list[int]:
        return [int(key) for key in self.keys(row)[:tokens].tolist()]

    @rule(
        content=st.integers(0, 1),
        stems=st.lists(st.tuples(token, st.integers(1, 90)), min_size=1, max_size=4),
    )
    def begin(self, content: int, stems: list[tuple[int, int]]) -> None:
        tokens = [token for token, times in stems for _ in range(times)][: self.window - 40]
        row, self.next = self.next, self.next + 1
        wanted = [100 * content + token for token in tokens]
        while True:
            found = self.known.find(content, tokens, len(tokens))
            blocks = [node.block for node in found.path]
            if self.cache.begin(row, blocks, shared=found.tokens, tokens=len(tokens)):
                break
            if not self.known.evict():
                return
        self.known.touch(found.path)
        assert self.read(row, found.tokens) == wanted[: found.tokens]
        self.write(row, wanted)
        self.rows[row] = content, tokens

    @rows_there
    @rule(chance=st.randoms(use_true_random=False), more=st.lists(token, max_size=40))
    def grow(self, chance: Random, more: list[int]) -> None:
        row = chance.choice(list(self.rows))
        content, tokens = self.rows[row]
        tokens = [*tokens, *more][: self.window]
        while not self.cache.reserve(row, len(tokens)):
            if not self.known.evict():
                return
        self.write(row, [100 * content + token for token in tokens])
        self.rows[row] = content, tokens

    @rows_there
    @rule(chance=st.randoms(use_true_random=False))
    def keep(self, chance: Random) -> None:
        row = chance.choice(list(self.rows))
        self.known.keep(*self.rows[row], row)
        content, tokens = self.rows[row]
        assert self.known.find(content, tokens, len(tokens)).tokens == len(tokens)

    @rows_there
    @rule(chance=st.randoms(use_true_random=False), kept=st.booleans())
    def end(self, chance: Random, kept: bool) -> None:
        row = chance.choice(list(self.rows))
        if kept:
            self.known.keep(*self.rows[row], row)
        del self.rows[row]
        self.known.detach(row)
        self.cache.release(row)

    @rule(content=st.integers(0, 1))
    def forget(self, content: int) -> None:
        self.known.forget(content)
        assert self.known.find(content, [5, 6] * 30, 60).tokens == 0

    @invariant()
    def rows_have_their_own_keys(self) -> None:
        for row, (content, tokens) in self.rows.items():
            assert self.read(row, len(tokens)) == [100 * content + token for token in tokens]

    @invariant()
    def the_budget_holds(self) -> None:
        assert self.cache.blocks.tokens >= 0
        assert self.cache.used_tokens + self.cache.blocks.tokens <= self.cache.total_tokens

    def teardown(self) -> None:
        for row in list(self.rows):
            self.known.detach(row)
            self.cache.release(row)
        assert self.cache.used_tokens == 0
        while self.known.evict():
            pass
        assert (len(self.known), self.cache.blocks.tokens) == (0, 0)
        everything = self.cache.total_tokens // self.window
        assert all(self.cache.reserve(-1 - row, self.window) for row in range(everything))


class PagedCacheMachine(CacheMachine):
    window = 3 * 256

    def make(self) -> KVCache:
        shapes = [LayerShape(1, 1, 1, torch.float32)]
        return PagedCache(
            shapes, torch.device("cpu"), total_tokens=3 * self.window, max_tokens=self.window
        )

    def places(self, row: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.tensor(self.cache.tables[row])
        positions = torch.arange(tokens)
        return table[positions // 256], positions % 256

    def write(self, row: int, keys: list[int]) -> None:
        blocks, offsets = self.places(row, len(keys))
        self.cache.keys[0][blocks, offsets, 0, 0] = torch.tensor(keys, dtype=torch.float32)

    def read(self, row: int, tokens: int) -> list[int]:
        blocks, offsets = self.places(row, tokens)
        return [int(key) for key in self.cache.keys[0][blocks, offsets, 0, 0].tolist()]


TestStripsAreSharedAndNeverLeak = CacheMachine.TestCase
TestBlocksAreSharedAndNeverLeak = PagedCacheMachine.TestCase
