"""Rows that run padded together, and how far each of them is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache, DummyLayer, EncoderDecoderCache

from server.engine.native.cache.padded_layers import (
    AttendingStateLayer,
    CacheMaker,
    CrossLayer,
    KeysAndValues,
    OwnLayer,
    StateLayer,
    States,
    states_of,
)


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a group was before a forward."""

    starts: list[int]
    end: int
    encoded: bool
    states: list[States]


@dataclass(slots=True)
class Group:
    """Rows that run together. Row i's tokens are in the columns `starts[i]:end`."""

    rows: list[int]
    starts: list[int]
    end: int
    columns: int
    layers: list[KeysAndValues]
    """Each `[rows, heads, columns, dim]`; no heads where a layer attends to nothing."""
    sources: list[int]
    """In an encoder-decoder: how many tokens of each row's source the decoder attends to."""
    crossed: list[KeysAndValues]
    """In an encoder-decoder, once the sources are encoded: each `[rows, heads, source, dim]`,
    aligned at the left."""
    states: list[States]
    """For each layer, what it carries from token to token."""
    make_cache: CacheMaker = Cache
    before: Mark | None = None
    """How far the group was before its last forward."""

    @contextmanager
    def advancing(self, tokens: Sequence[int]) -> Iterator[Cache]:
        """Within: a transformers model computes the next `tokens` of each row, reading and writing
        this `past_key_values`. What it wrote counts once it is through."""
        mark = Mark(list(self.starts), self.end, bool(self.crossed), self.states)
        self.before = None
        most = max(tokens)
        if all(start == self.end for start in self.starts):
            # New rows of unequal length: the shorter ones begin later.
            self.starts = [self.end + most - each for each in tokens]
        cache, own = self._cache()
        try:
            yield cache
        except BaseException:
            self._go_back(mark)
            raise
        self.end += most
        self.states = [states_of(layer) for layer in own.layers]
        self.before = mark

    def undo(self) -> None:
        """The last forward does not count: another part of its step failed."""
        assert self.before is not None, "a step is undone once"
        self._go_back(self.before)

    def length(self, row: int) -> int:
        """Tokens of a row that have keys and values."""
        return self.end - self.starts[self.rows.index(row)]

    def _go_back(self, mark: Mark) -> None:
        self.starts, self.end, self.states = mark.starts, mark.end, mark.states
        self.before = None
        if not mark.encoded:
            self.crossed.clear()

    def _cache(self) -> tuple[Cache, Cache]:
        """What the model takes, and that part of it which is for the rows' own tokens."""
        own = self.make_cache([self._layer(layer) for layer in range(len(self.layers))])
        if not self.sources:
            return own, own
        crossed = Cache(layers=[CrossLayer(self, layer) for layer in range(len(self.layers))])
        return EncoderDecoderCache(own, crossed), own

    def _layer(self, layer: int) -> Any:
        attends, states = self.layers[layer][0].shape[1] > 0, self.states[layer]
        if not states:
            return OwnLayer(self, layer) if attends else DummyLayer()  # type: ignore[no-untyped-call]
        return AttendingStateLayer(self, layer, states) if attends else StateLayer(states)
