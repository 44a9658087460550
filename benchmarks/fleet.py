"""Many replicas behind a router, on a virtual clock: our scheduler, residency and router, no model.

A replica is a `Simulation`. Requests come as a Poisson process, and each goes to one replica when
it comes. What the router knows of each replica's requests is exact, as where there is one proxy.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Literal, cast

from ray.serve.request_router import RunningReplica

from benchmarks.arrivals import poisson
from benchmarks.statistics import percentiles
from infuse.server.on_ray.routing import choose
from tests.engine.simulation import Arrival, Simulation

Routing = Literal["by adapter", "by load alone"]

BEGINNINGS = 1000
"""Beginnings of prompts that the router tells apart."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Seconds that a replica takes."""

    step: float
    token: float
    fill: float

    def saturation(self, rows: int, prompt: int, answer: int) -> float:
        """Requests a second that keep all rows busy: a request takes its tokens, and its share of
        the steps in which it decodes."""
        return 1 / (answer / rows * self.step + (prompt + answer) * self.token)

    def in_flight(self, rate: float, prompt: int, answer: int) -> float:
        """Requests that run in the mean, by Little's law: each takes `answer` steps, and a step
        takes the tokens of those that run and of the prompts that come meanwhile."""
        return rate * answer * self.step / (1 - rate * (prompt + answer) * self.token)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    replicas: int
    adapters: int
    routing: Routing
    speed: Speed
    load: float
    """The rate of requests as a part of what all replicas together can do."""
    prompt: int = 16
    answer: int = 16
    rows: int = 32
    slots: int = 256
    host_adapters: int = 0
    warm_up: int = 5000
    """Requests for each replica before, which fill its slots and its memory and take no time."""
    requests: int = 300
    """Requests for each replica that are timed."""
    exponent: float = 1.0
    """The n-th most popular adapter is asked for in proportion to `n ** -exponent`."""


class Replica(Simulation):
    """What the router sees of a replica, and the replica itself."""

    def __init__(self, number: int, fleet: Fleet) -> None:
        super().__init__(
            rows=fleet.rows,
            slots=fleet.slots,
            chunk=512,
            host_adapters=fleet.host_adapters,
            step_seconds=fleet.speed.step,
            token_seconds=fleet.speed.token,
            fill_seconds=fleet.speed.fill,
        )
        self.replica_id = SimpleNamespace(unique_id=f"replica{number}")
        self.routing_stats = {"ready": True}
        self.pretended = 0
        """Requests that the router is to see while slots and memory are filled."""

    @property
    def requests(self) -> int:
        return len(self.scheduler.running) + self.scheduler.waiting

    @property
    def length(self) -> int:
        """What the router knows."""
        return self.pretended or self.requests

    def use(self, adapter: str) -> None:
        """Have an adapter resident as after a request for it."""
        with self.lease(adapter) as lease:
            if self.residency.pin(lease) is not None:
                self.residency.unpin(lease)

    def advance(self, until: float) -> None:
        while self.requests and self.now < until:
            self.step()
        if not self.requests:
            self.now = max(self.now, until)


class Router:
    """Chooses replicas as `infuse deploy` does, or by their load alone."""

    def __init__(self, replicas: list[Replica], routing: Routing, rng: random.Random) -> None:
        self._replicas = cast(list[RunningReplica], replicas)
        self._by_adapter = routing == "by adapter"
        self._rng = rng

    def chosen(self, adapter: str) -> Replica:
        beginning = self._rng.randrange(BEGINNINGS)
        affinity = f"{adapter}-{beginning}" if self._by_adapter else ""
        first, *_ = choose(self._replicas, affinity, _length)
        return cast(Replica, min(first, key=_length))


def run(fleet: Fleet, seed: int = 0) -> dict[str, Any]:
    """What became of the timed requests."""
    rng = random.Random(seed)
    random.seed(seed)  # By which the router chooses two replicas.
    replicas = [Replica(number, fleet) for number in range(fleet.replicas)]
    router = Router(replicas, fleet.routing, rng)
    summed = list(accumulate(rank**-fleet.exponent for rank in range(1, fleet.adapters + 1)))
    names = [str(each) for each in range(fleet.adapters)]
    timed, before = (fleet.replicas * each for each in (fleet.requests, fleet.warm_up))
    of_one = fleet.load * fleet.speed.saturation(fleet.rows, fleet.prompt, fleet.answer)

    in_flight = fleet.speed.in_flight(of_one, fleet.prompt, fleet.answer)
    warm_up(router, rng.choices(names, cum_weights=summed, k=before), in_flight * len(replicas))
    filled, read = _fills(replicas), _reads(replicas)

    rate = of_one * fleet.replicas
    asked = rng.choices(names, cum_weights=summed, k=timed)
    for at, adapter in zip(poisson(rate, timed, seed), asked, strict=True):
        for each in replicas:
            each.advance(at)
        router.chosen(adapter).arrive(
            Arrival(at=at, prompt=fleet.prompt, answer=fleet.answer, adapter=adapter)
        )
    for each in replicas:
        each.advance(float("inf"))
        each.check_idle()

    journeys = [journey for each in replicas for journey in each.journeys]
    assert len(journeys) == timed
    counts = [len(each.journeys) for each in replicas]
    return asdict(fleet) | {
        "requests_per_second": rate,
        "ttft_ms": percentiles([1e3 * journey.ttft for journey in journeys]),
        "fills_per_request": (_fills(replicas) - filled) / timed,
        "reads_per_request": (_reads(replicas) - read) / timed,
        "busiest_over_mean": max(counts) / (timed / fleet.replicas),
    }


def warm_up(router: Router, asked: Sequence[str], in_flight: float) -> None:
    """Use adapters where the router has them used while so many requests run."""
    running: deque[Replica] = deque()
    for adapter in asked:
        replica = router.chosen(adapter)
        replica.use(adapter)
        replica.pretended += 1
        running.append(replica)
        if len(running) > in_flight:
            running.popleft().pretended -= 1
    for replica in running:
        replica.pretended = 0


def _length(replica: RunningReplica) -> int:
    return cast(Replica, replica).length


def _fills(replicas: Sequence[Replica]) -> int:
    return sum(each.slots.fills for each in replicas)


def _reads(replicas: Sequence[Replica]) -> int:
    return sum(each.reads for each in replicas)
