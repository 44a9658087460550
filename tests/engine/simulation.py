"""Hours of traffic in seconds: the server's own scheduler, cache and residency on a virtual clock.

There is no model: a step takes as long as its tokens would, and every row whose tokens are all
computed takes another one.
"""

import heapq
import itertools
from collections import abc
from dataclasses import dataclass, field

import torch

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Target
from infuse.adapters.residency import Lease, Residency
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.scheduling.scheduler import AMONG_TENANTS, Scheduler
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import GenerationRequest, SamplingParams
from tests.factories import tiny_tokenizer

_TOKENIZER = tiny_tokenizer()
_ADAPTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Arrival:
    at: float
    """Seconds."""
    prompt: int
    answer: int
    adapter: str = ""
    """"" is the base."""
    tenant: str = ""
    weight: float = 1.0
    guaranteed: int = 0
    priority: int = 0
    patience: float | None = None
    """Seconds after which the client leaves."""


@dataclass(eq=False)
class Journey:
    """What became of an arrival. Times are seconds on the virtual clock."""

    arrival: Arrival
    sequence: Sequence
    started: float | None = None
    first_token: float | None = None
    ended: float | None = None
    cancelled: bool = False

    def is_like(self, **like: object) -> bool:
        return all(getattr(self.arrival, name) == value for name, value in like.items())

    @property
    def ttft(self) -> float:
        assert self.first_token is not None
        return self.first_token - self.arrival.at


@dataclass
class Slots:
    """Slots that remember what is in them."""

    capacity: int
    saved_capacity: int = 0
    contents: dict[int, AdapterVectors] = field(default_factory=dict)
    fills: int = 0
    """How often a slot was filled."""

    def check(self, vectors: AdapterVectors) -> None:
        pass

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None:
        self.contents[slot] = vectors
        self.fills += 1

    def clear_slot(self, slot: int) -> None:
        del self.contents[slot]


class Simulation:
    def __init__(
        self,
        *,
        rows: int = 8,
        chunk: int = 256,
        slots: int = 8,
        window: int = 512,
        cache_tokens: int | None = None,
        host_adapters: int = 0,
        step_seconds: float = 0.010,
        token_seconds: float = 0.0005,
        fill_seconds: float = 0.0,
    ) -> None:
        """A step takes `step_seconds`, and `token_seconds` for each token: by default about as long
        as a 135M model's on two cores. It takes `fill_seconds` more for each slot that is filled.

        `host_adapters`: how many evicted adapters stay in host memory.
        """
        self.step_seconds, self.token_seconds = step_seconds, token_seconds
        self.fill_seconds = fill_seconds
        self.rows, self.chunk = rows, chunk
        self.now = 0.0
        self.slots = Slots(slots)
        self.residency = Residency(self.slots, host_bytes=host_adapters * _ADAPTER_BYTES)
        self.cache = StripCache(
            [], total_tokens=cache_tokens or (rows + 1) * window, max_tokens=window
        )
        self.scheduler = Scheduler(
            self.cache,
            self.residency,
            max_rows=rows,
            chunk_tokens=chunk,
            prefix_cache=False,
            now=lambda: self.now,
        )
        self.steps = 0
        self.reads = 0
        """How often an adapter that was asked for was not in memory."""
        self.journeys: list[Journey] = []
        self.served: dict[tuple[str, str], int] = {}
        """Tokens computed for each key and adapter; what was computed again counts once."""
        self._vectors: dict[str, AdapterVectors] = {}
        self._by_id: dict[int, Journey] = {}
        self._seq_ids = itertools.count()
        self._leaving: list[tuple[float, int]] = []

    def run(self, arrivals: abc.Iterable[Arrival], until: float = float("inf")) -> list[Journey]:
        """Everything that arrives before `until`; without it, to the end of the last."""
        coming = sorted(arrivals, key=lambda arrival: arrival.at)
        coming.reverse()
        while (coming or self._by_id) and self.now < until:
            if not self._by_id and coming:
                self.now = max(self.now, coming[-1].at)
            while coming and coming[-1].at <= self.now:
                self.arrive(coming.pop())
            while self._leaving and self._leaving[0][0] <= self.now:
                self._cancel(heapq.heappop(self._leaving)[1])
            if self._by_id:
                self.step()
        if until == float("inf"):
            self.check_idle()
        return self.journeys

    def arrive(self, arrival: Arrival) -> Journey:
        lease = self.lease(arrival.adapter) if arrival.adapter else None
        seq_id = next(self._seq_ids)
        request = GenerationRequest(
            id=str(seq_id),
            prompt=(5,) * arrival.prompt,
            params=SamplingParams(max_tokens=arrival.answer),
            lease=lease,
            tenant=arrival.tenant,
            weight=arrival.weight,
            guaranteed=arrival.guaranteed,
            priority=arrival.priority,
        )
        journey = Journey(arrival, Sequence(request, seq_id, _TOKENIZER))
        self.journeys.append(journey)
        self._by_id[seq_id] = journey
        self.scheduler.add(journey.sequence)
        if arrival.patience is not None:
            heapq.heappush(self._leaving, (arrival.at + arrival.patience, seq_id))
        return journey

    def lease(self, adapter: str) -> Lease:
        vectors = self.residency.find(adapter)
        if vectors is None:
            self.reads += 1
            vectors = self._vectors.get(adapter)
        if vectors is None:
            value = torch.tensor([len(self._vectors) + 1.0])
            vectors = self._vectors[adapter] = AdapterVectors({Target("m", "output"): value})
        return self.residency.lease(adapter, adapter, vectors)

    def step(self) -> Step:
        fills = self.slots.fills
        step = self.scheduler.schedule()
        self.now += self.fill_seconds * (self.slots.fills - fills)
        self._check(step)
        work = [*((s, 1) for s in step.decode), *step.prefill]
        for sequence, _ in work:
            journey = self._by_id[sequence.seq_id]
            if journey.started is None:
                journey.started = self.now
        self.now += self.step_seconds + self.token_seconds * sum(tokens for _, tokens in work)
        self.steps += 1
        for sequence, tokens in work:
            self._advance(sequence, tokens)
        return step

    def _advance(self, sequence: Sequence, tokens: int) -> None:
        sequence.advance(tokens)
        if sequence.uncomputed:
            return
        journey = self._by_id[sequence.seq_id]
        flow = sequence.tenant, sequence.adapter
        fresh = 1
        if journey.first_token is None:
            journey.first_token = self.now
            fresh += sequence.prompt_tokens
        self.served[flow] = self.served.get(flow, 0) + fresh
        sequence.append(7)
        if sequence.answer_tokens == sequence.request.params.max_tokens:
            self._end(journey)

    def _cancel(self, seq_id: int) -> None:
        journey = self._by_id.get(seq_id)
        if journey is not None:
            journey.cancelled = True
            self._end(journey)

    def _end(self, journey: Journey) -> None:
        assert journey.ended is None, "a request ends once"
        journey.ended = self.now
        sequence = journey.sequence
        self.scheduler.remove(sequence)
        if sequence.request.lease is not None:
            sequence.request.lease.release()
        del self._by_id[sequence.seq_id]

    def _check(self, step: Step) -> None:
        """What holds at every step."""
        running = self.scheduler.running
        assert step, "nobody waits while nothing runs"
        assert len(running) <= self.rows
        assert sum(tokens for _, tokens in step.prefill) <= self.chunk
        assert self.cache.used_tokens <= self.cache.total_tokens
        assert len(running) + self.scheduler.waiting == len(self._by_id)
        assert len(step.decode) == sum(s.uncomputed == 1 for s in running), "who can decode does"
        pinned = {s.adapter for s in running if s.adapter}
        assert self.residency.stats().pinned == len(pinned) <= self.slots.capacity
        prompts = sum(s.uncomputed for s in running if s.uncomputed > 1)
        least = self.chunk // AMONG_TENANTS if self.scheduler.is_shared else self.chunk
        assert min(prompts, least) <= sum(tokens for _, tokens in step.prefill)

    def check_idle(self) -> None:
        """What holds when nothing runs."""
        assert all(journey.ended is not None for journey in self.journeys)
        assert list(self.scheduler) == []
        assert self.cache.used_tokens == 0
        stats = self.residency.stats()
        assert (stats.leases, stats.pinned) == (0, 0)


def worst_ttft(journeys: abc.Sequence[Journey], **like: object) -> float:
    """The longest wait for a first token among arrivals that are like this."""
    return max(j.ttft for j in journeys if not j.cancelled and j.is_like(**like))
