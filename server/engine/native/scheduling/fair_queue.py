"""Which request is admitted next: fair among keys and each key's adapters, however many wait.

Virtual token counters, after "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024),
in two levels: the key that has had the least goes next, and within it the adapter that has. Who
asks for nothing saves up nothing.
"""

from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Generic, TypeVar

from server.engine.native.sequences.sequence import HEADROOM, Sequence

AGED_TURN = 8
"""How many better ones of its key may overtake a request before its like has a turn."""
_FEW = 64
"""Idle shares that are not worth a sweep."""
_ROW = attrgetter("row")
_RANK = attrgetter("rank")

Eligible = Callable[[Sequence], bool]


def cost(sequence: Sequence) -> int:
    """Tokens that a running sequence is charged. As many of its answer as room is set aside for
    count from the start, or all free rows would go to whoever has had least so far."""
    soon = min(sequence.request.params.max_tokens, HEADROOM)
    return max(had(sequence), had(sequence) - sequence.answer_tokens + soon)


def had(sequence: Sequence) -> int:
    """Tokens of prompt and answer, but for those that were cached."""
    return len(sequence.tokens) - (sequence.cached_tokens or 0)


@dataclass(eq=False, slots=True)
class _Share:
    """What a tenant, or one of its adapters, has used of the model."""

    ended: int = 0
    """Tokens of its requests that have ended."""
    started: set[Sequence] = field(default_factory=set)
    """Sequences that were admitted and have not ended."""
    waiting: int = 0

    @property
    def used(self) -> int:
        return self.ended + sum(map(cost, self.started))


S = TypeVar("S", bound=_Share)


class _Sharers(Generic[S]):
    """Those who share with each other, by name."""

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._shares: dict[str, S] = {}
        self._clock = 0
        """What the last one to have its turn had used until then."""
        self._sweep_at = _FEW

    def __getitem__(self, name: str) -> S:
        return self._shares[name]

    def __iter__(self) -> Iterator[S]:
        return iter(self._shares.values())

    def wait(self, name: str) -> S:
        """One more of its requests waits. Where none did, its turn is not earlier than that of
        those who have waited."""
        share = self._shares.get(name)
        if share is None:
            self._sweep()
            share = self._shares[name] = self._make()
        if not share.waiting:
            share.ended += max(0, self._clock - share.used)
        share.waiting += 1
        return share

    def start(self, name: str, sequence: Sequence) -> None:
        share = self._shares[name]
        self._clock = max(self._clock, share.used)
        share.waiting -= 1
        share.started.add(sequence)

    def end(self, name: str, sequence: Sequence) -> None:
        share = self._shares[name]
        share.started.remove(sequence)
        share.ended += had(sequence)

    def _sweep(self) -> None:
        """Forget those who are idle and owe nothing."""
        if len(self._shares) >= self._sweep_at:
            self._shares = {
                name: share
                for name, share in self._shares.items()
                if share.waiting or share.started or share.used > self._clock
            }
            self._sweep_at = max(_FEW, 2 * len(self._shares))


class _Tenant(_Share):
    """A key's requests: by priority, then fair among adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = _Sharers(_Share)
        self._classes: dict[int, dict[str, list[Sequence]]] = {}
        """Priority -> adapter -> its waiting sequences as they came."""
        self._overtaken = 0
        """Since the last turn of a worse priority: starts of sequences that came later."""

    def __iter__(self) -> Iterator[Sequence]:
        for adapters in self._classes.values():
            for line in adapters.values():
                yield from line

    def add(self, sequence: Sequence) -> None:
        adapters = self._classes.setdefault(sequence.request.priority, {})
        insort(adapters.setdefault(sequence.adapter, []), sequence, key=_ROW)

    def remove(self, sequence: Sequence) -> None:
        priority, adapter = sequence.request.priority, sequence.adapter
        line = self._classes[priority][adapter]
        line.remove(sequence)
        if not line:
            del self._classes[priority][adapter]
            if not self._classes[priority]:
                del self._classes[priority]

    def first(self, eligible: Eligible) -> Sequence | None:
        priorities = sorted(self._classes)
        if self._overtaken >= AGED_TURN and len(priorities) > 1:
            aged = min(priorities[1:], key=self._oldest)
            priorities.remove(aged)
            priorities.insert(0, aged)
        for priority in priorities:
            heads = [line[0] for line in self._classes[priority].values() if eligible(line[0])]
            if heads:
                return min(heads, key=lambda head: (self.adapters[head.adapter].used, head.row))
        return None

    def turn(self, sequence: Sequence) -> None:
        """The sequence is about to start."""
        best, *worse = sorted(self._classes)
        if not worse or sequence.request.priority > best:
            self._overtaken = 0
        elif min(map(self._oldest, worse)) < sequence.row:
            self._overtaken += 1

    def _oldest(self, priority: int) -> int:
        return min(line[0].row for line in self._classes[priority].values())


class FairQueue:
    """The waiting sequences, and what those that have started cost their keys and adapters.

    First come those that gave way, in order of rank; then whoever has had least. Within a key a
    better priority goes first, but now and then a worse one has a turn.
    """

    def __init__(self) -> None:
        self._tenants = _Sharers(_Tenant)
        self._returning: list[Sequence] = []

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returning
        for tenant in self._tenants:
            yield from tenant

    def __len__(self) -> int:
        return len(self._returning) + sum(tenant.waiting for tenant in self._tenants)

    def add(self, sequence: Sequence) -> None:
        if sequence.has_started:
            insort(self._returning, sequence, key=_RANK)
            return
        tenant = self._tenants.wait(sequence.tenant)
        tenant.adapters.wait(sequence.adapter)
        tenant.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """The sequence no longer waits, and does not start."""
        if sequence.has_started:
            self._returning.remove(sequence)
            return
        tenant = self._tenants[sequence.tenant]
        tenant.remove(sequence)
        tenant.adapters[sequence.adapter].waiting -= 1
        tenant.waiting -= 1

    def first(self, eligible: Eligible) -> Sequence | None:
        """The sequence that is to start next, among those that are eligible."""
        for sequence in self._returning:
            if eligible(sequence):
                return sequence
        waiting = [tenant for tenant in self._tenants if tenant.waiting]
        found = [tenant.first(eligible) for tenant in sorted(waiting, key=attrgetter("used"))]
        return next((sequence for sequence in found if sequence is not None), None)

    def start(self, sequence: Sequence) -> None:
        """The sequence starts, or starts again; it is charged until it ends."""
        if sequence.has_started:
            self._returning.remove(sequence)
            return
        tenant = self._tenants[sequence.tenant]
        tenant.turn(sequence)
        tenant.remove(sequence)
        self._tenants.start(sequence.tenant, sequence)
        tenant.adapters.start(sequence.adapter, sequence)

    def end(self, sequence: Sequence) -> None:
        """A sequence that has started has ended."""
        tenant = self._tenants[sequence.tenant]
        tenant.adapters.end(sequence.adapter, sequence)
        self._tenants.end(sequence.tenant, sequence)
