"""Which rows run in the next step, and how many of their tokens."""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from adapters.bank import BASE_SLOT
from adapters.residency import Residency
from server.engine.kv_cache import KVCache
from server.engine.prefixes import Prefixes
from server.engine.sequence import Sequence

_HEADROOM = 64
"""Tokens of the answer that admission sets aside room for, so that a row seldom moves at once."""
_RANK = attrgetter("rank")


@dataclass(frozen=True, slots=True)
class Step:
    """One forward: a token for each decoding row in the cache's order, then the prefill chunks."""

    decode: list[Sequence]
    prefill: list[tuple[Sequence, int]]
    """A sequence and how many of its next tokens to compute."""

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Admits waiting sequences in order of priority, then arrival; preempts from the other end.

    A running sequence holds a row, room in the cache and its adapter's pin; a waiting one holds
    none of them. Nothing fails for want of room: it waits, or is computed again. A sequence whose
    leader is still to compute what they share lets others go first.
    """

    def __init__(
        self, cache: KVCache, residency: Residency, max_rows: int, chunk_tokens: int
    ) -> None:
        """`chunk_tokens` bounds the prompt tokens of a step, so that decoding rows do not stall."""
        self._cache = cache
        self._residency = residency
        self._max_rows = max_rows
        self._chunk_tokens = chunk_tokens
        self._prefixes = Prefixes(cache)
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._expecting: list[Sequence] = []
        """Waiting too, for what their leaders compute."""
        self.running: list[Sequence] = []
        """In the order of admission."""
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._expecting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self._expecting
        yield from (sequence for _, sequence in self._waiting)

    def add(self, sequence: Sequence, leader: Sequence | None = None) -> None:
        """`leader` is the one that the sequence's request names, if it has not ended."""
        if leader is not None:
            self._prefixes.follow(sequence, leader)
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: release what it holds, wherever it is."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self._expecting:
            self._expecting.remove(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not sequence]
            heapq.heapify(self._waiting)
        self._prefixes.end(sequence)

    def schedule(self) -> Step:
        decode = self._grow([s for s in self.running if s.uncomputed == 1])
        self._admit()
        decode += [s for s in self.running if s.uncomputed == 1 and s not in decode]
        by_row = {sequence.row: sequence for sequence in decode}
        prefill: list[tuple[Sequence, int]] = []
        budget = self._chunk_tokens
        for sequence in sorted(self.running, key=_RANK):
            if sequence.uncomputed > 1 and budget > 0:
                tokens = min(budget, sequence.uncomputed)
                if sequence.computed < sequence.source_tokens:
                    # An encoder reads its source whole, in a step of its own if need be.
                    if tokens < sequence.uncomputed and prefill:
                        break
                    tokens = sequence.uncomputed
                prefill.append((sequence, tokens))
                budget -= tokens
        return Step([by_row[row] for row in self._cache.order(list(by_row))], prefill)

    def _grow(self, decode: list[Sequence]) -> list[Sequence]:
        """Room for one more token each; the last in rank give way where there is none."""
        growing = deque(sorted(decode, key=_RANK))
        grown = []
        while growing:
            sequence = growing.popleft()
            if self._cache.reserve(sequence.row, len(sequence.tokens)):
                grown.append(sequence)
                continue
            if self._prefixes.drop():
                growing.appendleft(sequence)
                continue
            victim = max(self.running, key=_RANK)
            self._preempt(victim)
            if victim is not sequence:
                growing.appendleft(sequence)
                growing = deque(s for s in growing if s is not victim)
                grown = [s for s in grown if s is not victim]
        return grown

    def _admit(self) -> None:
        for sequence in [s for s in self._expecting if not self._prefixes.must_wait(s)]:
            self._expecting.remove(sequence)
            self.add(sequence)
        while self._waiting and len(self.running) < self._max_rows:
            sequence = self._waiting[0][1]
            if self._prefixes.must_wait(sequence):
                heapq.heappop(self._waiting)
                self._expecting.append(sequence)
                continue
            slot = self._pin(sequence)
            if slot is None:
                return
            left = sequence.request.params.max_tokens - sequence.answer_tokens
            room = len(sequence.tokens) + max(0, min(left, _HEADROOM) - 1)
            if not self._prefixes.reserve(sequence, room):
                self._unpin(sequence)
                if self._prefixes.drop(below=sequence if self.running else None):
                    continue
                return
            heapq.heappop(self._waiting)
            sequence.slot = slot
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self._cache.release(sequence.row)
        sequence.computed = 0
        self.preemptions += 1
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._unpin(sequence)
        sequence.slot = None

    def _pin(self, sequence: Sequence) -> int | None:
        lease = sequence.request.lease
        return BASE_SLOT if lease is None else self._residency.pin(lease)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.request.lease is not None:
            self._residency.unpin(sequence.request.lease)
