"""The KV cache of rows that run padded, in the layout of transformers' own caches.

Rows that run together lie in one *group*, for each layer `[rows, heads, columns, dim]`. They are
aligned at the right: every row's newest token has the same column, and shorter rows are padded at
the left. This is the one layout in which all model families batch, also those that count positions
from the end of their cache. A group stays as long as its rows run together. When the batch changes,
its rows are copied into a new group, once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

import torch
from transformers.cache_utils import Cache

from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.padded_group import Group
from infuse.server.engine.native.cache.padded_layers import (
    CacheMaker,
    KeysAndValues,
    LayerStates,
    States,
    empty_layer,
    states_nbytes,
)
from infuse.server.engine.native.faults import FAULTS, Fault, KeysLost

_COLUMNS = 64
"""A group's number of columns is a multiple of this, so that it seldom grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The columns of a sequence that a block stands for."""

    seq_id: int
    begin: int
    end: int


class PaddedBlocks:
    """Blocks of `PaddedCache`: in the groups of running sequences, or detached as copies.

    In an encoder-decoder a block holds the cross-attention's keys and values of a whole source.
    """

    def __init__(self, cache: "PaddedCache", crosses: bool) -> None:
        self._cache = cache
        self.size = None if crosses else _COLUMNS
        self._attached: dict[int, _Part] = {}
        self._copies: dict[int, list[KeysAndValues]] = {}
        """Detached block -> for each layer `[1, heads, tokens, dim]`."""
        self._numbers = count()
        self.tokens = 0

    def keep(self, seq_id: int, *, start: int, tokens: int) -> list[int]:
        size = self.size or tokens
        parts = [
            _Part(seq_id=seq_id, begin=begin, end=min(begin + size, start + tokens))
            for begin in range(start, start + tokens, size)
        ]
        blocks = [next(self._numbers) for _ in parts]
        self._attached.update(zip(blocks, parts, strict=True))
        return blocks

    def detach(self, seq_id: int) -> list[int]:
        attached = sorted(
            (part.begin, block) for block, part in self._attached.items() if part.seq_id == seq_id
        )
        while attached and self._cache.holds(seq_id):
            part = self._attached[attached[0][1]]
            if self._cache.room < _rounded(part.end - part.begin):
                break
            block = attached[0][1]
            try:
                copies = [(keys.clone(), values.clone()) for keys, values in self._layers(block)]
            except FAULTS as error:
                if not Fault.of(error).no_memory:
                    raise
                break
            attached.pop(0)
            self._copies[block] = copies
            del self._attached[block]
            self.tokens += _taken(self._copies[block])
        return [block for _, block in attached]

    def drop(self, block: int) -> None:
        if block in self._copies:
            self.tokens -= _taken(self._copies.pop(block))
        else:
            del self._attached[block]

    def is_detached(self, block: int) -> bool:
        return block in self._copies

    def to_evict(self, blocks: Iterable[int]) -> Sequence[int]:
        return list(islice(filter(self.is_detached, blocks), 1))

    def layers(self, blocks: Sequence[int]) -> list[KeysAndValues]:
        """Join the keys and values of these blocks: for each layer `[1, heads, tokens, dim]`."""
        return [
            (torch.cat([keys for keys, _ in layer], 2), torch.cat([v for _, v in layer], 2))
            for layer in zip(*map(self._layers, blocks), strict=True)
        ]

    def _layers(self, block: int) -> list[KeysAndValues]:
        if block in self._copies:
            return self._copies[block]
        part = self._attached[block]
        span = slice(part.begin, part.end)
        layers = self._cache.layers_of(part.seq_id, crossed=self.size is None)
        return [(keys[:, :, span], values[:, :, span]) for keys, values in layers]


def _taken(kept: list[KeysAndValues]) -> int:
    return _rounded(kept[0][0].shape[2])


class PaddedCache:
    """A KV cache of groups. Its budget counts padding: rows times the longest row."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        device: torch.device,
        *,
        total_tokens: int,
        max_tokens: int,
        crosses: bool = False,
        carried: Sequence[LayerStates] = (),
        max_rows: int = 0,
        make_cache: CacheMaker = Cache,
    ) -> None:
        """`max_tokens` is the length of the longest sequence. `crosses`: the model is an
        encoder-decoder, whose layers keep keys and values of source and answer. `carried`: for each
        layer, the states that it carries beside keys and values; the states of `max_rows` rows are
        not part of the budget of tokens.

        Raises DoesNotFit if the longest sequence does not fit.
        """
        if total_tokens < _rounded(max_tokens):
            raise DoesNotFit(
                f"a cache of {total_tokens} tokens is too small for a window of {max_tokens}: "
                f"set --kv-cache-tokens to {_rounded(max_tokens)} or more, or --max-model-len lower"
            )
        self.total_tokens = total_tokens
        self.nbytes = total_tokens * sum(s.nbytes for s in shapes) * (2 if crosses else 1)
        self.nbytes += states_nbytes(carried, max_rows)
        self.shares = not any(each.count for each in carried)
        self._shapes = list(shapes)
        self._states = [each.count for each in carried] or [0] * len(shapes)
        self._device = device
        self._crosses = crosses
        self._make_cache = make_cache
        self._reserved: dict[int, int] = {}
        self._groups: dict[int, Group] = {}
        self.blocks = PaddedBlocks(self, crosses)

    @property
    def used_tokens(self) -> int:
        return len(self._reserved) * max(list(self._reserved.values()), default=0)

    @property
    def room(self) -> int:
        return self.total_tokens - self.used_tokens - self.blocks.tokens

    def reserve(self, seq_id: int, tokens: int) -> bool:
        wanted = self._reserved | {seq_id: max(_rounded(tokens), self._reserved.get(seq_id, 0))}
        if len(wanted) * max(wanted.values()) + self.blocks.tokens > self.total_tokens:
            return False
        self._reserved = wanted
        return True

    def begin(self, seq_id: int, blocks: Sequence[int], *, shared: int, tokens: int) -> bool:
        assert seq_id not in self._groups, "only a new sequence begins"
        if not self.reserve(seq_id, tokens):
            return False
        layers = [
            (keys[:, :, :shared], values[:, :, :shared])
            for keys, values in self.blocks.layers(blocks)
        ]
        # The group has no free column: the sequence's first step copies it into a new one.
        if self._crosses:
            own = [(keys[:, :, :0], values[:, :, :0]) for keys, values in layers]
            end, sources, crossed = 0, [shared], layers
        else:
            end, sources, crossed, own = shared, [], [], layers
        self._groups[seq_id] = Group(
            seq_ids=[seq_id],
            starts=[0],
            end=end,
            columns=end,
            layers=own,
            sources=sources,
            crossed=crossed,
            states=self._nothing,
        )
        return True

    def holds(self, seq_id: int) -> bool:
        """Whether the sequence has keys and values. False once they were lost."""
        return seq_id in self._groups

    def layers_of(self, seq_id: int, crossed: bool) -> list[KeysAndValues]:
        """View the keys and values of a sequence's own tokens, or (`crossed`) of its source: for
        each layer `[1, heads, tokens, dim]`."""
        group = self._groups[seq_id]
        index = group.seq_ids.index(seq_id)
        span = slice(0, group.sources[index]) if crossed else slice(group.starts[index], group.end)
        layers = group.crossed if crossed else group.layers
        return [
            (keys[index, None, :, span], values[index, None, :, span]) for keys, values in layers
        ]

    def release(self, seq_id: int) -> None:
        self._reserved.pop(seq_id, None)
        self._groups.pop(seq_id, None)

    def order(self, seq_ids: Sequence[int]) -> list[int]:
        """Sort by arrival, so that the other sequences keep their order when one ends."""
        return sorted(seq_ids)

    def gather(
        self,
        seq_ids: Sequence[int],
        lengths: Sequence[int],
        tokens: int,
        sources: Sequence[int] = (),
    ) -> Group:
        """Bring exactly these sequences into one group, in this order, with free columns for
        `tokens` more tokens.

        `lengths`: how many tokens of each sequence are computed. If a group has more, its last
        forward was part of a step that failed, and is undone. `sources`: in an encoder-decoder, the
        length of each sequence's source. Raises KeysLost.
        """
        for seq_id, length in zip(seq_ids, lengths, strict=True):
            old = self._groups.get(seq_id)
            if old is not None and old.length(seq_id) != length:
                old.undo()
            assert old is None or old.length(seq_id) == length, "one forward is undone at most"
        group = self._groups.get(seq_ids[0])
        if group is None or group.seq_ids != list(seq_ids) or group.end + tokens > group.columns:
            try:
                group = self._group(list(seq_ids), tokens, list(sources))
            except (RuntimeError, MemoryError) as error:
                for seq_id in seq_ids:
                    self._groups.pop(seq_id, None)
                raise KeysLost from error
            self._groups |= dict.fromkeys(seq_ids, group)
        return group

    def _group(self, seq_ids: list[int], tokens: int, sources: list[int]) -> Group:
        parts = self._parts(seq_ids)
        spent = [old for old, _ in parts if self._stay_in(old).issubset(seq_ids)]
        lengths = {seq_id: old.length(seq_id) for old, mine in parts for seq_id in mine}
        end = max(lengths.values(), default=0)
        columns = _rounded(end + tokens)
        starts = [end - lengths.get(seq_id, 0) for seq_id in seq_ids]
        layers = []
        for layer, shape in enumerate(self._shapes):
            keys, values = empty_layer(shape, len(seq_ids), columns, self._device)
            for old, mine in parts:
                to, at = self._indices(seq_ids, mine), self._indices(old.seq_ids, mine)
                width = max(lengths[seq_id] for seq_id in mine)
                for new, kept in zip((keys, values), old.layers[layer], strict=True):
                    new[to, :, end - width : end] = kept[at, :, old.end - width : old.end]
            layers.append((keys, values))
            for old in spent:
                # Free the old layer now: two copies of all layers may not fit.
                old.layers[layer] = (keys[:0], values[:0])
        crossed = self._crossed(seq_ids, parts, sources) if parts and self._crosses else []
        states = self._joined_states(seq_ids, parts) if parts else self._nothing
        return Group(
            seq_ids=seq_ids,
            starts=starts,
            end=end,
            columns=columns,
            layers=layers,
            sources=sources,
            crossed=crossed,
            states=states,
            make_cache=self._make_cache,
        )

    @property
    def _nothing(self) -> list[States]:
        """The states of new rows: none yet."""
        return [[None] * (2 * pairs) for pairs in self._states]

    def _joined_states(
        self, seq_ids: list[int], parts: list[tuple[Group, list[int]]]
    ) -> list[States]:
        joined: list[States] = []
        for layer, pairs in enumerate(self._states):
            assert not pairs or sum(len(mine) for _, mine in parts) == len(seq_ids), (
                "rows that carry a state do not run with new ones"
            )
            states: States = []
            for number in range(2 * pairs):
                state: torch.Tensor | None = None
                for old, mine in parts:
                    kept = old.states[layer][number]
                    if kept is None:
                        continue
                    if state is None:
                        state = kept.new_empty(len(seq_ids), *kept.shape[1:])
                    state[self._indices(seq_ids, mine)] = kept[self._indices(old.seq_ids, mine)]
                states.append(state)
            joined.append(states)
        return joined

    def _crossed(
        self, seq_ids: list[int], parts: list[tuple[Group, list[int]]], sources: list[int]
    ) -> list[KeysAndValues]:
        longest = max(sources)
        layers = []
        for layer, shape in enumerate(self._shapes):
            keys, values = empty_layer(shape, len(seq_ids), longest, self._device)
            for old, mine in parts:
                to, at = self._indices(seq_ids, mine), self._indices(old.seq_ids, mine)
                for new, kept in zip((keys, values), old.crossed[layer], strict=True):
                    width = min(longest, kept.shape[2])
                    new[to, :, :width] = kept[at, :, :width]
            layers.append((keys, values))
        return layers

    def _parts(self, seq_ids: Sequence[int]) -> list[tuple[Group, list[int]]]:
        """Find the groups that these sequences are in now, and which have tokens in each."""
        parts: list[tuple[Group, list[int]]] = []
        for seq_id in seq_ids:
            group = self._groups.get(seq_id)
            if group is None or not (group.length(seq_id) or group.crossed):
                continue
            known = next((mine for old, mine in parts if old is group), None)
            if known is None:
                parts.append((group, [seq_id]))
            else:
                known.append(seq_id)
        return parts

    def _stay_in(self, group: Group) -> set[int]:
        return {seq_id for seq_id in group.seq_ids if self._groups.get(seq_id) is group}

    def _indices(self, seq_ids: list[int], mine: list[int]) -> torch.Tensor:
        return torch.tensor([seq_ids.index(seq_id) for seq_id in mine], device=self._device)


def _rounded(tokens: int) -> int:
    return -(-tokens // _COLUMNS) * _COLUMNS
