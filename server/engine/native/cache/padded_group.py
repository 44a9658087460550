"""A group: rows that run padded together, and how far each of them is computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache, DummyLayer, EncoderDecoderCache

from infuse.server.engine.native.cache.padded_layers import (
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
    """The progress of a group before a forward, to go back to."""

    starts: list[int]
    end: int
    encoded: bool
    states: list[States]


@dataclass(slots=True, kw_only=True)
class Group:
    """Rows that run together. Row i's tokens are in the columns `starts[i]:end`."""

    seq_ids: list[int]
    """The sequence of each row."""
    starts: list[int]
    end: int
    columns: int
    layers: list[KeysAndValues]
    """For each layer `[rows, heads, columns, dim]`; no heads if the layer has no attention."""
    sources: list[int]
    """In an encoder-decoder: the tokens of each row's source that the decoder attends to."""
    crossed: list[KeysAndValues]
    """In an encoder-decoder, once the sources are encoded: for each layer
    `[rows, heads, source, dim]`, aligned at the left."""
    states: list[States]
    """For each layer, the states that it carries from token to token."""
    make_cache: CacheMaker = Cache
    before: Mark | None = None
    """The group's progress before its last forward."""

    @contextmanager
    def advancing(self, tokens: Sequence[int]) -> Iterator[Cache]:
        """Give a model the `past_key_values` for the next `tokens` of each row.

        The group advances when the context ends without an error.
        """
        mark = Mark(list(self.starts), self.end, bool(self.crossed), self.states)
        self.before = None
        most = max(tokens)
        if all(start == self.end for start in self.starts):
            # New rows of unequal length: shorter rows start at a later column.
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
        """Undo the last forward, because another part of its step failed."""
        assert self.before is not None, "a step is undone once"
        self._go_back(self.before)

    def length(self, seq_id: int) -> int:
        """How many tokens of a sequence have keys and values."""
        return self.end - self.starts[self.seq_ids.index(seq_id)]

    def _go_back(self, mark: Mark) -> None:
        self.starts, self.end, self.states = mark.starts, mark.end, mark.states
        self.before = None
        if not mark.encoded:
            self.crossed.clear()

    def _cache(self) -> tuple[Cache, Cache]:
        """Make the cache that the model takes, and name the part of it for the rows' own tokens."""
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
