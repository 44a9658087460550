"""Which rows run in the next step, and how many of their tokens."""

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from adapters.bank import BASE_SLOT
from adapters.residency import Residency
from server.engine.kv_cache import KVCache
from server.engine.sequence import Sequence

_HEADROOM = 64
"""Tokens of the answer that admission sets aside room for, so that a row seldom moves at once."""


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
    none of them. Nothing fails for want of room: it waits, or is computed again.
    """

    def __init__(
        self, cache: KVCache, residency: Residency, max_rows: int, chunk_tokens: int
    ) -> None:
        """`chunk_tokens` bounds the prompt tokens of a step, so that decoding rows do not stall."""
        self._cache = cache
        self._residency = residency
        self._max_rows = max_rows
        self._chunk_tokens = chunk_tokens
        self._waiting: list[tuple[int, int, Sequence]] = []
        self.running: list[Sequence] = []
        """In the order of admission."""
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from (sequence for *_, sequence in self._waiting)

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (*_rank(sequence), sequence))

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended: release what it holds, wherever it is."""
        if sequence in self.running:
            self._release(sequence)
        else:
            self._waiting = [entry for entry in self._waiting if entry[2] is not sequence]
            heapq.heapify(self._waiting)

    def schedule(self) -> Step:
        decode = self._grow([s for s in self.running if s.uncomputed == 1])
        self._admit()
        decode += [s for s in self.running if s.uncomputed == 1 and s not in decode]
        by_row = {sequence.row: sequence for sequence in decode}
        prefill: list[tuple[Sequence, int]] = []
        budget = self._chunk_tokens
        for sequence in self.running:
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
        growing = deque(sorted(decode, key=_rank))
        grown = []
        while growing:
            sequence = growing.popleft()
            if self._cache.reserve(sequence.row, len(sequence.tokens)):
                grown.append(sequence)
                continue
            victim = max(self.running, key=_rank)
            self._preempt(victim)
            if victim is not sequence:
                growing.appendleft(sequence)
                growing = deque(s for s in growing if s is not victim)
                grown = [s for s in grown if s is not victim]
        return grown

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self._max_rows:
            sequence = self._waiting[0][2]
            slot = self._pin(sequence)
            if slot is None:
                return
            left = sequence.request.params.max_tokens - sequence.answer_tokens
            room = len(sequence.tokens) + max(0, min(left, _HEADROOM) - 1)
            if not self._cache.reserve(sequence.row, room):
                self._unpin(sequence)
                return
            heapq.heappop(self._waiting)
            sequence.slot = slot
            self.running.append(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self.add(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._cache.release(sequence.row)
        self._unpin(sequence)
        sequence.slot = None

    def _pin(self, sequence: Sequence) -> int | None:
        lease = sequence.request.lease
        return BASE_SLOT if lease is None else self._residency.pin(lease)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.request.lease is not None:
            self._residency.unpin(sequence.request.lease)


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Smaller is served earlier. Row numbers rise with arrival."""
    return sequence.request.priority, sequence.row
