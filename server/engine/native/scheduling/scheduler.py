"""The scheduler: it decides which rows run in the next step, and how many of their tokens."""

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import attrgetter

from infuse.adapters.model.bank import BASE_SLOT
from infuse.adapters.residency import Residency
from infuse.server.engine.fair_queue import HEADROOM, FairQueue
from infuse.server.engine.native.cache.kv_cache import KVCache
from infuse.server.engine.native.faults import FAULTS, Fault
from infuse.server.engine.native.scheduling.prefixes import Prefixes
from infuse.server.engine.native.scheduling.speculation import Speculation
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import WaitsFor

_FIRST_SHARE = 4
"""The prompt of the highest rank gets at least a step's prompt tokens divided by this."""
_LIGHT = 2
"""A tenant is light while its prompts have at most a step's prompt tokens divided by this
(docs/decisions/0061-short-steps.md)."""
_LIGHTEST = 4
"""While several tenants use the model, the lightest of those that are not light gets a step's
prompt tokens divided by this, where there is another."""
AMONG_TENANTS = 8
"""The others get a step's prompt tokens divided by this, all together."""
_RANK = attrgetter("rank")


class CannotStart(Exception):
    """A sequence's adapter could not be copied to the device, or the cache could not begin it."""

    def __init__(self, sequence: Sequence, fault: Fault) -> None:
        self.sequence = sequence
        self.fault = fault


@contextmanager
def _starting(sequence: Sequence) -> Iterator[None]:
    """Within this context, errors of the device become CannotStart for this sequence."""
    fault = None
    try:
        yield
    except FAULTS as error:
        fault = Fault.of(error)
    if fault is not None:
        raise CannotStart(sequence, fault)


class _Claim:
    """Prevents starvation of the first sequence that found all slots in use.

    A few other sequences may overtake it. After that no sequence of another adapter starts before
    it, so that a slot becomes free. Sequences of the base need no slot and always start.
    """

    def __init__(self, patience: int) -> None:
        """`patience`: how many sequences may overtake the holder."""
        self._patience = patience
        self._holder: Sequence | None = None
        self._overtaken = 0

    def make(self, sequence: Sequence) -> None:
        if self._holder is None:
            self._holder = sequence
            self._overtaken = 0

    def drop(self, sequence: Sequence) -> None:
        if sequence is self._holder:
            self._holder = None

    def admits(self, sequence: Sequence) -> bool:
        if self._holder is None or self._overtaken < self._patience:
            return True
        return sequence.adapter in ("", self._holder.adapter)

    def note_start(self, sequence: Sequence) -> None:
        """Count a sequence that starts, or end the claim if it is the holder."""
        self.drop(sequence)
        if self._holder is not None and sequence.adapter:
            self._overtaken += 1


class Scheduler:
    """Admits waiting sequences in the order of a fair queue, and preempts the last in rank.

    A running sequence holds a row, room in the KV cache and a pin of its adapter. A waiting one
    holds none of them. No sequence fails because there is no room: it waits, or is preempted and
    computed again. A sequence whose prefix another is computing waits for that one. A sequence
    whose adapter finds no free slot waits too, while a few others overtake it.
    """

    def __init__(
        self,
        cache: KVCache,
        residency: Residency,
        *,
        max_rows: int,
        chunk_tokens: int,
        prefix_cache: bool = True,
        whole_prompts: bool = False,
        speculation: Speculation | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`chunk_tokens` bounds the prompt tokens of a step, so that decoding rows do not stall;
        while several tenants use the model, less of it bounds those of tenants that send much.
        With `whole_prompts` a prompt is not divided, and `chunk_tokens` bounds their sum. Without
        `prefix_cache`, only the requests of one order share prefixes. Without `speculation`, no
        tokens are drafted."""
        self._cache = cache
        self._residency = residency
        self._max_rows = max_rows
        self._chunk_tokens = chunk_tokens
        self._whole_prompts = whole_prompts
        self._speculation = speculation
        self.prefixes = Prefixes(cache, across_orders=prefix_cache)
        self._queue: FairQueue[Sequence] = FairQueue(now)
        self._awaiting_prefix: list[Sequence] = []
        """Waiting sequences whose prefix another sequence is computing."""
        self._turns = itertools.count()
        self._claim = _Claim(max_rows)
        self._lacking: dict[Sequence, WaitsFor] = {}
        """What was missing for a sequence when the latest step could not admit it."""
        self.running: list[Sequence] = []
        """The running sequences, in order of admission."""
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._queue) + len(self._awaiting_prefix)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self._awaiting_prefix
        yield from self._queue

    def waits_for(self, sequence: Sequence) -> WaitsFor:
        """What keeps a waiting sequence from running. Any thread may call this."""
        if sequence in self._awaiting_prefix:
            return WaitsFor.PREFIX
        full = len(self.running) >= self._max_rows
        return self._lacking.get(sequence, WaitsFor.ROW if full else WaitsFor.TURN)

    def add(self, sequence: Sequence) -> None:
        self.prefixes.add(sequence)
        self._queue.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Release all that a sequence that has ended holds, whether it ran or waited."""
        if sequence in self.running:
            self._stop(sequence)
        elif sequence in self._awaiting_prefix:
            self._awaiting_prefix.remove(sequence)
        else:
            self._leave_queue(sequence)
        if sequence.has_started:
            self._queue.end(sequence)
        self.prefixes.end(sequence)

    def schedule(self) -> Step:
        """Plan the next step: make room for running rows, admit waiting ones, choose chunks, draft.

        Raises CannotStart.
        """
        self.prefixes.settle()
        decode = self._grow([s for s in self.running if s.uncomputed == 1])
        self._admit()
        decode += [s for s in self.running if s.uncomputed == 1 and s not in decode]
        by_id = {sequence.seq_id: sequence for sequence in decode}
        step = Step([by_id[seq_id] for seq_id in self._cache.order(list(by_id))], self._prefill())
        return step if self._speculation is None else self._speculation.draft(step, self.prefixes)

    def _prefill(self) -> list[tuple[Sequence, int]]:
        """Choose chunks of prompts: the shortest first, but some of the highest in rank always.

        While several tenants use the model, those that send much get few tokens of a step: no other
        waits long for a step that computes their prompts.
        """
        prompts = [s for s in self.running if s.uncomputed > 1]
        if not prompts:
            return []
        bounds = self._bounds(prompts)
        first = min(prompts, key=_RANK)
        least = max(1, bounds[first.tenant] // _FIRST_SHARE)
        chunks = {first: self._chunk(first, least) or first.uncomputed}
        taken = chunks[first]
        for sequence in sorted(prompts, key=lambda s: (-bounds[s.tenant], s.uncomputed, s.rank)):
            given = chunks.get(sequence, 0)
            tokens = self._chunk(sequence, given + max(0, bounds[sequence.tenant] - taken))
            if tokens > given:
                chunks[sequence] = tokens
                taken += tokens - given
        return list(chunks.items())

    def _bounds(self, prompts: list[Sequence]) -> dict[str, int]:
        """Tenant -> how many prompt tokens a step may have, those of lighter tenants included, once
        it computes any of the tenant's."""
        bounds = {each.tenant: self._chunk_tokens for each in prompts}
        if not self.is_shared:
            return bounds
        tokens = Counter[str]()
        for each in prompts:
            # Not only what is left: the rest of a long prompt would make a long step.
            tokens[each.tenant] += max(each.used_tokens, each.uncomputed)
        most = self._chunk_tokens // _LIGHT
        heavy = sorted((n, tenant) for tenant, n in tokens.items() if n > most)
        for _, tenant in heavy:
            bounds[tenant] = max(1, self._chunk_tokens // AMONG_TENANTS)
        if len(heavy) > 1:
            bounds[heavy[0][1]] = max(1, self._chunk_tokens // _LIGHTEST)
        return bounds

    @property
    def is_shared(self) -> bool:
        """Whether several tenants use the model now, or have asked lately."""
        running = {sequence.request.tenant for sequence in self.running}
        return len(running | self._queue.tenants_lately) > 1

    def _chunk(self, sequence: Sequence, most: int) -> int:
        """How many tokens of a sequence to compute, at most `most`. 0 if it must be computed as a
        whole and has more: an encoder's source, or any prompt of some models."""
        whole = self._whole_prompts or sequence.computed < sequence.source_tokens
        return 0 if whole and sequence.uncomputed > most else min(most, sequence.uncomputed)

    def _grow(self, decode: list[Sequence]) -> list[Sequence]:
        """Make room for one more token of each sequence; preempt the last in rank if there is none.

        Returns those that have room.
        """
        growing = deque(sorted(decode, key=_RANK))
        grown = []
        while growing:
            sequence = growing.popleft()
            if self.prefixes.grow(sequence):
                grown.append(sequence)
                continue
            victim = max(self.running, key=_RANK)
            self.preempt(victim)
            if victim is not sequence:
                growing.appendleft(sequence)
                growing = deque(s for s in growing if s is not victim)
                grown = [s for s in grown if s is not victim]
        return grown

    def _admit(self) -> None:
        self._lacking = {}
        for follower in [s for s in self._awaiting_prefix if not self.prefixes.must_wait(s)]:
            self._awaiting_prefix.remove(follower)
            self._queue.add(follower)
        slots_left = True
        while len(self.running) < self._max_rows:
            sequence = self._queue.first(self._claim.admits if slots_left else self._can_pin)
            if sequence is None:
                return
            if self.prefixes.must_wait(sequence):
                self._leave_queue(sequence)
                self._awaiting_prefix.append(sequence)
                continue
            with _starting(sequence):
                slot = self._pin(sequence)
            if slot is None:
                slots_left = False
                self._claim.make(sequence)
                self._lacking[sequence] = WaitsFor.SLOT
                sequence.lack_slot()
                continue
            if not self._begin(sequence):
                self._lacking[sequence] = WaitsFor.BLOCKS
                return
            self._start(sequence, slot)

    def _can_pin(self, sequence: Sequence) -> bool:
        lease = sequence.request.lease
        resident = lease is None or self._residency.is_resident(lease)
        return resident and self._claim.admits(sequence)

    def _begin(self, sequence: Sequence) -> bool:
        """Begin a sequence in the cache. Without room, unpin its adapter and return False."""
        left = sequence.request.params.max_tokens - sequence.answer_tokens
        room = len(sequence.tokens) + max(0, min(left, HEADROOM) - 1)
        begun = False
        try:
            with _starting(sequence):
                begun = self.prefixes.begin(sequence, room)
        finally:
            if not begun:
                self._unpin(sequence)
        return begun

    def _start(self, sequence: Sequence, slot: int) -> None:
        self._queue.start(sequence)
        self._claim.note_start(sequence)
        sequence.start(slot, next(self._turns))
        self.running.append(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._claim.drop(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Release a running sequence's row and queue the sequence to be computed again."""
        self._stop(sequence)
        self.prefixes.preempt(sequence)
        sequence.preempt()
        self.preemptions += 1
        self._queue.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._unpin(sequence)

    def _pin(self, sequence: Sequence) -> int | None:
        lease = sequence.request.lease
        return BASE_SLOT if lease is None else self._residency.pin(lease)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.request.lease is not None:
            self._residency.unpin(sequence.request.lease)
