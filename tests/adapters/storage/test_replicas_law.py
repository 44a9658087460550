"""Whatever gets lost or late, no server is current without what another one has acknowledged.

Servers of one bucket take turns in a world of its own time. While a request is on its way, other
servers go on, time passes, and the request may fail, or seem to fail and be done later. Each server
has a clock of its own, which is too fast or too slow.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count

import obstore
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from infuse.adapters.errors import Overtaken, StoreLocked, StoreUnreachable
from infuse.adapters.storage.bucket_journal import SharedBucketJournal
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import Replicas

LEASE = 10.0
SERVERS = 4
DEEP = 3
"""How many servers are in the midst of a step at once."""


class World:
    """Time, and who lives in it. It stands in for the module `time`."""

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        self.bucket = MemoryStore()
        self.now = 1000.0
        self.names = count()
        self.servers: list[Server] = []
        self.stepping: list[Server] = []
        self.late: list[tuple[float, Callable[[], object]]] = []
        """When a request that seemed to be lost is done."""
        self.acknowledged: list[str] = []
        self.bustle = 0.5
        """How likely another server takes a step while something is on its way."""
        self.trouble = 0.04
        """How likely a request fails."""

    def clock_gettime(self, _: int) -> float:
        return self.stepping[-1].clock(self.now)

    def monotonic(self) -> float:
        return self.stepping[-1].clock(self.now)

    def sleep(self, seconds: float) -> None:
        self.let_pass(seconds)

    def let_pass(self, seconds: float) -> None:
        """Time passes, and others take steps."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 1.0)
            for each in [each for each in self.late if each[0] <= self.now]:
                self.late.remove(each)
                each[1]()
            self.check()
            others = [server for server in self.servers if server not in self.stepping]
            if others and len(self.stepping) < DEEP and self.choose.random() < self.bustle:
                self.step(self.choose.choice(others))

    def step(self, server: "Server") -> None:
        step = self.choose.choices(
            [server.follow, server.change, server.compact, self.open, server.die],
            [14, 8, 6, 1, 0.5],
        )[0]
        with self.stepping_as(server), suppress(StoreUnreachable, StoreLocked):
            step()
        self.check()

    def open(self) -> None:
        if len(self.servers) < SERVERS:
            server = Server(self)
            with self.stepping_as(server):
                server.follow()
            self.servers.append(server)

    @contextmanager
    def stepping_as(self, server: "Server") -> Iterator[None]:
        self.stepping.append(server)
        try:
            yield
        finally:
            self.stepping.pop()

    def check(self) -> None:
        for server in self.servers:
            with self.stepping_as(server):
                if server.replicas.is_current:
                    missing = set(self.acknowledged) - set(server.names)
                    assert not missing, f"{missing} of {self.acknowledged}"


class LateObjects(Objects):
    """A bucket behind a network that is slow, and loses requests and answers."""

    def __init__(self, world: World) -> None:
        super().__init__(world.bucket, "memory://")
        self.world = world
        self.before_create: Callable[[], object] = lambda: None
        self.after_put: Callable[[], object] = lambda: None

    def on_its_way(self, request: Callable[[], object] | None = None) -> None:
        """`request`: what a request does that seems to be lost and is late."""
        choose = self.world.choose
        self.world.let_pass(choose.uniform(0, 0.1))
        if choose.random() < self.world.trouble:
            self.world.let_pass(choose.uniform(0, 2 * LEASE))
            if choose.random() < 0.3:
                if request is not None and choose.random() < 0.5:
                    due = self.world.now + choose.uniform(0, 2 * LEASE)
                    self.world.late.append((due, request))
                raise StoreUnreachable("lost")

    def answered(self) -> None:
        choose = self.world.choose
        self.world.let_pass(choose.uniform(0, 0.1))
        if choose.random() < self.world.trouble:
            self.world.let_pass(choose.uniform(0, 2 * LEASE))
            if choose.random() < 0.2:
                raise StoreUnreachable("no answer")

    def create(self, key: str, data: bytes) -> bool:
        create = super().create
        self.on_its_way(lambda: create(key, data))
        self.before_create()
        created = create(key, data)
        self.answered()
        return created

    def put(self, key: str, data: bytes) -> None:
        put = super().put
        self.on_its_way(lambda: put(key, data))
        put(key, data)
        self.after_put()
        self.answered()

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        found = []
        self.on_its_way()
        for key in keys:
            self.world.let_pass(0.01)
            found += super().get_all([key])
        self.answered()
        return found

    def list(self, prefix: str) -> "list[str]":
        self.on_its_way()
        keys = super().list(prefix)
        self.answered()
        return keys

    def delete(self, keys: Iterable[str]) -> None:
        delete = super().delete
        for key in keys:
            self.on_its_way(lambda key=key: delete([key]))  # type: ignore[misc]
            delete([key])
        self.answered()


class Server:
    def __init__(self, world: World) -> None:
        self.world = world
        self.born = world.now
        self.speed = world.choose.uniform(0.93, 1.07)
        self.shift = world.choose.uniform(-1e6, 1e6)
        self.objects = LateObjects(world)
        self.replicas = Replicas(self.objects, LEASE)
        self.journal = SharedBucketJournal(self.objects, str(next(world.names)), self.replicas)
        self.names: list[str] = []

    def clock(self, now: float) -> float:
        return self.shift + (now - self.born) * self.speed

    def take_in(self, events: Iterable[dict[str, object]]) -> None:
        self.names += [str(event["name"]) for event in events]

    def follow(self) -> None:
        self.replicas.follow(self.journal, self.take_in)

    def change(self) -> None:
        """As a store does."""
        name = str(next(self.world.names))
        while True:
            self.take_in(self.journal.settle())
            try:
                self.journal.append({"event": "details", "name": name})
                break
            except Overtaken:
                continue
        self.names.append(name)
        self.replicas.wait_for(self.journal.last)
        self.world.acknowledged.append(name)

    def compact(self) -> None:
        self.journal.compact(min(self.journal.last, self.replicas.all_have()))

    def die(self) -> None:
        self.world.servers.remove(self)


@given(st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_no_server_is_current_without_what_was_acknowledged(seed: int) -> None:
    world = World(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infuse.adapters.storage.replicas.time", world)
        for _ in range(80):
            if world.servers:
                world.step(world.choose.choice(world.servers))
            else:
                with suppress(StoreUnreachable):
                    world.open()
        check_at_the_end(world)


def check_at_the_end(world: World) -> None:
    """Once all is calm, a new server finds all that was acknowledged, in one order, and so do the
    others."""
    world.bustle = world.trouble = 0
    world.let_pass(3 * LEASE)
    new = Server(world)
    for server in [new, *world.servers]:
        with world.stepping_as(server):
            while not server.replicas.is_current:
                with suppress(StoreUnreachable, StoreLocked):
                    server.follow()
            server.follow()
    assert set(world.acknowledged) <= set(new.names)
    assert len(set(new.names)) == len(new.names)
    for server in world.servers:
        assert server.names == new.names


# Rare moments


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """A calm world."""
    world = World(0)
    world.bustle = world.trouble = 0
    monkeypatch.setattr("infuse.adapters.storage.replicas.time", world)
    return world


def opened(world: World) -> tuple[Server, str]:
    """A new server, and the key under which it shows itself."""
    before = keys(world)
    world.open()
    [key] = set(keys(world)) - set(before)
    return world.servers[-1], key


def keys(world: World) -> list[str]:
    return [each["path"] for each in obstore.list(world.bucket, "replicas").collect()]


def test_a_server_whose_key_is_removed_just_as_it_shows_itself_is_not_current(
    world: World,
) -> None:
    """Another server has seen the key unchanged for a lease."""
    (slow, key), (other, _) = opened(world), opened(world)
    world.let_pass(0.7 * LEASE)

    def meanwhile() -> None:
        world.let_pass(0.4 * LEASE)
        other.objects.delete([key])

    slow.objects.after_put = meanwhile
    with world.stepping_as(slow), suppress(StoreUnreachable):
        slow.follow()
    with world.stepping_as(other):
        other.follow()
        other.change()
    world.check()


def test_a_server_that_was_away_is_seen_whatever_removal_of_its_key_is_on_its_way(
    world: World,
) -> None:
    (away, key), (other, _) = opened(world), opened(world)
    world.let_pass(2 * LEASE)
    with world.stepping_as(away):
        away.follow()
    other.objects.delete([key])
    with world.stepping_as(other):
        other.follow()
        other.change()
    world.check()


def test_what_a_server_appended_while_it_was_away_is_not_acknowledged(world: World) -> None:
    """Others have joined the event of that number into a segment, so it seemed to be free."""
    (away, _), (other, _) = opened(world), opened(world)

    def meanwhile() -> None:
        away.objects.before_create = lambda: None
        with world.stepping_as(other):
            for _ in range(4):
                world.let_pass(LEASE / 2)
                other.follow()
            other.change()
            other.follow()
            other.compact()

    away.objects.before_create = meanwhile
    with world.stepping_as(away), suppress(StoreUnreachable):
        away.change()
    assert len(keys(world)) == 1, "nobody waits for the one that is away"
    check_at_the_end(world)
