"""The waiting queue: it chooses the next request fairly among tenants and each tenant's adapters.

Tenants first get the tokens that they are guaranteed. What is left is shared by virtual tokens,
after "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024), on two levels: the
tenant that has used the fewest tokens for its weight is next, and within it the adapter that has
used the fewest. An idle tenant saves up no credit. A tenant is an API key.
"""

import itertools
import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from infuse.server.engine.request import GenerationRequest
from infuse.server.engine.token_bucket import Bucket

MAX_OVERTAKEN = 8
"""How many sequences may overtake a tenant's older ones of a worse priority before one starts."""
HEADROOM = 64
"""Tokens of the answer that a request is charged from its start. Our own engine reserves room for
them, so that keys seldom move soon after."""
_SWEEP_FROM = 64
"""Number of shares from which on idle ones are removed."""
_LATELY = 10.0
"""Seconds. A tenant that has sent a request so long ago may send another one soon."""
_SEQ_ID = attrgetter("seq_id")
_RANK = attrgetter("rank")


def least_charge(requests: Iterable[GenerationRequest]) -> int:
    """Tokens that requests are charged when they start, if nothing of their prompts is cached."""
    return sum(
        len(request.prompt) + min(request.params.max_tokens, HEADROOM) for request in requests
    )


class Queued(Protocol):
    """A sequence as the queue sees it."""

    @property
    def request(self) -> GenerationRequest: ...
    @property
    def seq_id(self) -> int:
        """Its number in the order of arrival."""
        ...

    @property
    def has_started(self) -> bool: ...
    @property
    def rank(self) -> Any:
        """Of preempted sequences, the one with the smallest goes on first."""
        ...

    @property
    def used_tokens(self) -> int:
        """Tokens of prompt and answer, without those that were cached."""
        ...

    @property
    def charge(self) -> int:
        """Tokens that it is charged while it runs.

        The first `HEADROOM` tokens of the answer count from the start. Otherwise the tenant with
        the smallest charge would get all free rows at once.
        """
        ...


Q = TypeVar("Q", bound=Queued)


@dataclass(eq=False, slots=True)
class _Share:
    """The tokens that a tenant, or one of its adapters, has used, divided by the weight of the
    tenant."""

    ended: float = 0.0
    """Tokens of sequences that have ended."""
    started: set[Queued] = field(default_factory=set)
    """Sequences that were admitted and have not ended."""
    waiting: int = 0
    """How many sequences wait to be admitted."""

    @property
    def used(self) -> float:
        return self.ended + sum(each.charge / each.request.weight for each in self.started)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.started)


S = TypeVar("S", bound=_Share)


class _Shares(Generic[S]):
    """The shares among which the model is divided fairly, by name: tenants, or adapters of one."""

    def __init__(self, make: Callable[[], S]) -> None:
        self._make = make
        self._shares: dict[str, S] = {}
        self._clock = 0.0
        """The most that any share had used when one of its sequences started."""
        self._sweep_at = _SWEEP_FROM

    def __getitem__(self, name: str) -> S:
        return self._shares[name]

    def __iter__(self) -> Iterator[S]:
        return iter(self._shares.values())

    def wait(self, name: str) -> S:
        """Count one more waiting sequence of this share. If it had none, its used tokens are raised
        to the clock, so that it does not come before shares that have waited."""
        share = self._shares.get(name)
        if share is None:
            self._sweep()
            share = self._shares[name] = self._make()
        if not share.waiting:
            share.ended += max(0, self._clock - share.used)
        share.waiting += 1
        return share

    def start(self, name: str, sequence: Queued) -> None:
        share = self._shares[name]
        self._clock = max(self._clock, share.used)
        share.waiting -= 1
        share.started.add(sequence)

    def end(self, name: str, sequence: Queued) -> None:
        share = self._shares[name]
        share.started.remove(sequence)
        share.ended += sequence.used_tokens / sequence.request.weight

    def _sweep(self) -> None:
        """Remove idle shares that have used no more than the clock says."""
        if len(self._shares) >= self._sweep_at:
            self._shares = {
                name: share
                for name, share in self._shares.items()
                if not share.is_idle or share.used > self._clock
            }
            self._sweep_at = max(_SWEEP_FROM, 2 * len(self._shares))


class _Guarantee:
    """The tokens by which a tenant's sequences may start ahead of others'. They fill evenly, up to
    a minute's worth. What starts by them is not charged to the tenant's share."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.per_minute = 0
        """0: nothing is guaranteed."""
        self.latest = 0
        """The number of the sequence that last started by it, among all that start so."""
        self._bucket = Bucket(now)
        self._spent: dict[Queued, int] = {}
        """Sequence that started by it and has not ended -> the tokens that it has spent."""

    def __contains__(self, sequence: Queued) -> bool:
        return sequence in self._spent

    @property
    def left(self) -> float:
        """The tokens that are left. Where it is 0 or less, nothing starts by it."""
        if not self.per_minute:
            return 0.0
        for sequence in self._spent:
            self._spend(sequence, sequence.charge)
        return self._bucket.left(self.per_minute)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is spent of it."""
        return not self._spent and self.left >= self.per_minute

    def start(self, sequence: Queued, number: int) -> None:
        self.latest = number
        self._spent[sequence] = 0

    def end(self, sequence: Queued) -> None:
        self._spend(sequence, sequence.used_tokens)
        del self._spent[sequence]

    def _spend(self, sequence: Queued, tokens: int) -> None:
        """Note that a sequence has spent so many tokens since its start."""
        self._bucket.spend(tokens - self._spent[sequence], self.per_minute)
        self._spent[sequence] = tokens


class _Tenant(_Share, Generic[Q]):
    """A tenant's waiting sequences: by priority, then fair among adapters."""

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__()
        self.guarantee = _Guarantee(now)
        self.adapters = _Shares(_Share)
        self._classes: dict[int, dict[str, list[Q]]] = {}
        """Priority -> adapter -> its waiting sequences, in order of arrival."""
        self._overtaken = 0
        """How many sequences of the best priority started before older ones of a worse priority,
        since one of a worse priority started."""

    def __iter__(self) -> Iterator[Q]:
        for adapters in self._classes.values():
            for line in adapters.values():
                yield from line

    @property
    def turn(self) -> tuple[float, float]:
        """The tenant with the smallest is next. Those who have something left of what they are
        guaranteed come first, one after the other."""
        return (0, self.guarantee.latest) if self.guarantee.left > 0 else (1, self.used)

    @property
    def is_idle(self) -> bool:
        return super().is_idle and self.guarantee.is_whole

    def add(self, sequence: Q) -> None:
        self.guarantee.per_minute = sequence.request.guaranteed
        adapters = self._classes.setdefault(sequence.request.priority, {})
        insort(adapters.setdefault(sequence.request.adapter, []), sequence, key=_SEQ_ID)

    def remove(self, sequence: Q) -> None:
        priority, adapter = sequence.request.priority, sequence.request.adapter
        line = self._classes[priority][adapter]
        line.remove(sequence)
        if not line:
            del self._classes[priority][adapter]
            if not self._classes[priority]:
                del self._classes[priority]

    def first(self, eligible: Callable[[Q], bool]) -> Q | None:
        priorities = sorted(self._classes)
        if self._overtaken >= MAX_OVERTAKEN and len(priorities) > 1:
            aged = min(priorities[1:], key=self._oldest)
            priorities.remove(aged)
            priorities.insert(0, aged)
        for priority in priorities:
            heads = [line[0] for line in self._classes[priority].values() if eligible(line[0])]
            if heads:
                return min(
                    heads, key=lambda head: (self.adapters[head.request.adapter].used, head.seq_id)
                )
        return None

    def count_overtaking(self, sequence: Q) -> None:
        """Note whether a sequence that is about to start overtakes others of a worse priority."""
        best, *worse = sorted(self._classes)
        if not worse or sequence.request.priority > best:
            self._overtaken = 0
        elif min(map(self._oldest, worse)) < sequence.seq_id:
            self._overtaken += 1

    def _oldest(self, priority: int) -> int:
        return min(line[0].seq_id for line in self._classes[priority].values())


class FairQueue(Generic[Q]):
    """The waiting sequences, and the tokens that started ones are charged to tenants and adapters.

    Preempted sequences come first, in order of rank; then tenants that have something left of what
    they are guaranteed; then the tenant that has used the fewest tokens for its weight. Within a
    tenant a better priority goes first, but a worse one is not overtaken for ever.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._tenants = _Shares[_Tenant[Q]](lambda: _Tenant(now))
        self._numbers = itertools.count(1)
        self._preempted: list[Q] = []
        self._now = now
        self._latest = ("", -math.inf)
        """The tenant whose sequence was added last, and when."""
        self._another = ("", -math.inf)
        """Likewise, of the tenants but that one."""

    def __iter__(self) -> Iterator[Q]:
        yield from self._preempted
        for tenant in self._tenants:
            yield from tenant

    def __len__(self) -> int:
        return len(self._preempted) + sum(tenant.waiting for tenant in self._tenants)

    @property
    def tenants_lately(self) -> set[str]:
        """The tenants of sequences that were added lately: two, where there are more."""
        since = self._now() - _LATELY
        return {tenant for tenant, at in (self._latest, self._another) if at > since}

    def add(self, sequence: Q) -> None:
        if sequence.has_started:
            insort(self._preempted, sequence, key=_RANK)
            return
        if sequence.request.tenant != self._latest[0]:
            self._another = self._latest
        self._latest = (sequence.request.tenant, self._now())
        tenant = self._tenants.wait(sequence.request.tenant)
        tenant.adapters.wait(sequence.request.adapter)
        tenant.add(sequence)

    def remove(self, sequence: Q) -> None:
        """Remove a sequence that will not start, or not yet."""
        if sequence.has_started:
            self._preempted.remove(sequence)
            return
        tenant = self._tenants[sequence.request.tenant]
        tenant.remove(sequence)
        tenant.adapters[sequence.request.adapter].waiting -= 1
        tenant.waiting -= 1

    def first(self, eligible: Callable[[Q], bool]) -> Q | None:
        """The eligible sequence that starts next."""
        for sequence in self._preempted:
            if eligible(sequence):
                return sequence
        waiting = [tenant for tenant in self._tenants if tenant.waiting]
        found = [tenant.first(eligible) for tenant in sorted(waiting, key=attrgetter("turn"))]
        return next((sequence for sequence in found if sequence is not None), None)

    def start(self, sequence: Q) -> None:
        """Remove a sequence that starts, or starts again. It is charged until it ends."""
        if sequence.has_started:
            self._preempted.remove(sequence)
            return
        tenant = self._tenants[sequence.request.tenant]
        tenant.count_overtaking(sequence)
        tenant.remove(sequence)
        if tenant.guarantee.left > 0:
            tenant.waiting -= 1
            tenant.guarantee.start(sequence, next(self._numbers))
        else:
            self._tenants.start(sequence.request.tenant, sequence)
        tenant.adapters.start(sequence.request.adapter, sequence)

    def end(self, sequence: Q) -> None:
        """Settle the charge of a sequence that has started and ended."""
        tenant = self._tenants[sequence.request.tenant]
        tenant.adapters.end(sequence.request.adapter, sequence)
        if sequence in tenant.guarantee:
            tenant.guarantee.end(sequence)
        else:
            self._tenants.end(sequence.request.tenant, sequence)
