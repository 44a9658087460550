"""Several servers on one store, under requests, while adapters change and servers are killed."""

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import pytest

from tests.api.oracle import upload
from tests.api.replicas import replicas
from tests.api.stores import ADAPTERS, Place, complete
from tests.api.stores import place as place
from tests.on_ray.deployed import deployed
from tests.reliability_page import FIGURE

NAMES = ("a", "b", "c")
SERVERS = 3
ASKING = 3
PAUSE = 0.02
"""Seconds between two requests of a client."""
PAUSE_BESIDE_A_START = 0.2
"""The same while a server starts, which takes the same cores."""
KEPT = 10
"""How many revisions a server keeps."""


class Replica(Protocol):
    """A server that may be killed, and a client that asks it, or any of those behind a router."""

    client: httpx.Client

    def kill(self) -> None: ...

    def may_fail(self, begun: float) -> bool:
        """Whether a request that began then may have failed because a server was killed."""


class Replicas(Protocol):
    @property
    def alive(self) -> Sequence[Replica]: ...

    def replace(self, killed: Replica) -> None:
        """Wait until another server is there for one that was killed."""


@dataclass(frozen=True)
class Known:
    """What is acknowledged of a name."""

    number: int = 0
    """The last number that was given to it."""
    digest: str | None = None
    """Of its content; None where there is no such adapter."""
    history: tuple[tuple[int, str], ...] = ()
    """The number and digest of each revision since it was created."""

    def after(self, number: int, digest: str) -> "Known":
        history = self.history if self.digest is not None else ()
        return Known(number, digest, (*history, (number, digest))[-KEPT:])

    @property
    def shown(self) -> tuple[int, str] | None:
        return None if self.digest is None else (self.number, self.digest)


@dataclass
class Story:
    """What the clients of all servers know, and what they found to be wrong."""

    names: dict[str, Known] = field(default_factory=lambda: dict.fromkeys(NAMES, Known()))
    moves: Counter[str] = field(default_factory=Counter)
    """Name -> how many changes of it have begun, and how many have ended."""
    texts: dict[str, set[str]] = field(default_factory=dict)
    """Digest -> what that content has answered."""
    answered: int = 0
    stale: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    mutex: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def changing(self, name: str) -> Iterator[None]:
        """Within, the old state is right and the new one too."""
        for _ in range(2):
            with self.mutex:
                self.moves[name] += 1
            if self.moves[name] % 2:
                yield

    def ask(self, replica: Replica, name: str) -> None:
        """Ask a server for an adapter, and compare with what was acknowledged before."""
        begun = time.monotonic()
        with self.mutex:
            known, moves = self.names[name], self.moves[name]
        try:
            answer = complete(replica.client, name)
        except httpx.HTTPError as error:
            if not replica.may_fail(begun):
                self.failed.append(f"{name}: {error!r}")
            return
        with self.mutex:
            is_settled = self.moves[name] == moves and moves % 2 == 0
        self.answered += 1
        if answer.status_code not in (200, 404):
            self.failed.append(f"{name}: {answer.status_code} {answer.text}")
        elif answer.status_code == 404:
            if known.digest is not None and is_settled:
                self.stale.append(f"{name} is not found, and is at {known}")
        else:
            number = int(answer.headers["Infuse-Adapter"].partition("@")[2])
            oldest = known.number + (known.digest is None)
            if number < oldest or (number > known.number and is_settled):
                self.stale.append(f"{name}@{number} answers, and it is at {known}")
            elif number == known.number and known.digest is not None:
                text = answer.json()["choices"][0]["text"]
                self.texts.setdefault(known.digest, set()).add(text)


class Changes:
    """Makes random changes by random servers, and compares what all servers show then."""

    def __init__(self, servers: Replicas, folders: dict[str, Path], seed: int) -> None:
        self.servers = servers
        self.folders = list(folders.values())
        self.choose = random.Random(seed)
        self.story = Story()
        self.pause = PAUSE

    def round(self, kill: bool) -> None:
        name = self.choose.choice(NAMES)
        replica = self.choose.choice(self.servers.alive)
        doomed = self.choose.choice(self.servers.alive) if kill else None
        moment = self.choose.uniform(0, 0.3)
        begun = time.monotonic()
        with self.story.changing(name), ThreadPoolExecutor(1) as thread:
            change = thread.submit(self.change, replica, name)
            if doomed is not None:
                time.sleep(moment)
                doomed.kill()
                self.pause = PAUSE_BESIDE_A_START
                self.servers.replace(doomed)
                self.pause = PAUSE
            try:
                known = change.result()
            except httpx.HTTPError:
                assert replica.may_fail(begun)
                known = self.found_out(name)
            self.story.names[name] = known
            for each in self.servers.alive:
                if (shown := self.shown(each, name)) != known.shown:
                    self.story.lost.append(f"{name} is shown as {shown}, and is at {known}")

    def change(self, replica: Replica, name: str) -> Known:
        """Make a change; return what holds then. Raises httpx.HTTPError where the server dies."""
        known = self.story.names[name]
        path, folder = f"{ADAPTERS}/{name}", self.choose.choice(self.folders)
        kind = self.choose.choice(["replace", "replace", "roll back", "delete"])
        if known.digest is None:
            answer = upload(replica.client, name, folder)
        elif kind == "delete":
            assert replica.client.delete(path).status_code == 204
            return Known(known.number)
        elif kind == "roll back":
            number = self.choose.choice(known.history)[0]
            answer = replica.client.post(f"{path}/rollback", json={"revision": number})
        else:
            answer = upload(replica.client, name, folder, "PUT")
        assert answer.is_success, answer.text
        made = answer.json()
        assert made["revision"] == known.number + (not made["unchanged"])
        return known if made["unchanged"] else known.after(made["revision"], made["digest"])

    def found_out(self, name: str) -> Known:
        """Learn whether a change was made that was not acknowledged. A change that is brings all
        servers as far."""
        server = self.choose.choice(self.servers.alive)
        upload(server.client, "beacon", self.folders[0])
        said = {"description": str(self.choose.random())}
        assert server.client.patch(f"{ADAPTERS}/beacon", json=said).status_code == 200
        known, shown = self.story.names[name], self.shown(server, name)
        if shown is None:
            return Known(known.number)
        return known if shown == known.shown else known.after(*shown)

    def shown(self, replica: Replica, name: str) -> tuple[int, str] | None:
        answer = replica.client.get(f"{ADAPTERS}/{name}")
        if answer.status_code == 404:
            return None
        assert answer.status_code == 200, answer.text
        return answer.json()["revision"], answer.json()["digest"]


@contextmanager
def under_requests(changes: Changes) -> Iterator[None]:
    """Within, clients ask random servers for random adapters."""
    ended = threading.Event()

    def ask(seed: int) -> None:
        choose = random.Random(seed)
        while not ended.wait(changes.pause):
            changes.story.ask(choose.choice(changes.servers.alive), choose.choice(NAMES))

    with ThreadPoolExecutor(ASKING) as threads:
        asking = [threads.submit(ask, seed) for seed in range(ASKING)]
        try:
            yield
        finally:
            ended.set()
    for each in asking:
        each.result()


def hold(servers: Replicas, folders: dict[str, Path], rounds: int, kills: int) -> None:
    """Make so many rounds of changes under requests; fail where the law does not hold."""
    changes = Changes(servers, folders, seed=rounds)
    with under_requests(changes):
        for number in range(rounds):
            between = rounds // kills
            changes.round(kill=number % between == between // 2)
    story = changes.story
    print(f"{rounds} rounds, {kills} kills, {story.answered} answers")
    assert (story.stale, story.lost, story.failed) == ([], [], [])
    assert story.answered > 10 * rounds
    assert all(len(texts) == 1 for texts in story.texts.values())


@pytest.fixture
def flags(place: Place, model_folder: Path) -> list[str]:
    flags = [f"--model={model_folder}", "--served-model-name=tiny", "--max-batch-rows=4"]
    flags += [f"--adapters-dir={place.settings['adapters_dir']}", "--shared-store"]
    return [*flags, LEASE]


LEASE = "--replica-lease=5"
TEN_MINUTES = pytest.mark.timeout(600)
LONG = pytest.param(1000, 333, marks=[pytest.mark.full, pytest.mark.timeout(4 * 3600)])


@pytest.mark.fault(
    "process",
    "Servers that share a store are killed under requests and changes",
    by="SIGKILL at a random moment",
    promise="No other server's request fails, no acknowledged change is lost, and no server "
    "answers from before one.",
)
@pytest.mark.parametrize(("rounds", "kills"), [(8, 1), LONG])
def test_no_server_answers_from_before_a_change_that_any_server_has_acknowledged(
    tmp_path: Path,
    flags: list[str],
    adapter_folders: dict[str, Path],
    rounds: int,
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    """And no acknowledged change is lost, and no request fails, also where servers are killed."""
    with replicas(tmp_path, SERVERS, flags) as servers:
        hold(servers, adapter_folders, rounds, kills)
    record_property(FIGURE, f"{rounds} changes, {kills} kills")


@pytest.mark.fault(
    "process",
    "A server that shares its store stands still while others change it",
    by="SIGSTOP, then SIGCONT",
    promise="It answers by what others have changed.",
)
def test_a_server_that_was_stopped_answers_with_what_others_have_changed_since(
    tmp_path: Path, flags: list[str], adapter_folders: dict[str, Path]
) -> None:
    with replicas(tmp_path, 2, flags) as servers:
        one, stopped = servers.alive
        upload(one.client, "a", adapter_folders["default"])
        assert complete(stopped.client, "a").headers["Infuse-Adapter"] == "a@1"
        os.kill(stopped.pid, signal.SIGSTOP)
        assert upload(one.client, "a", adapter_folders["mlp"], "PUT").status_code == 200
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(complete, stopped.client, "a")
            time.sleep(0.1)
            os.kill(stopped.pid, signal.SIGCONT)
            assert answer.result().headers["Infuse-Adapter"] == "a@2"


@pytest.mark.fault(
    "process",
    "Replicas on Ray are killed under requests and changes",
    by="SIGKILL at a random moment",
    promise="Another one takes the place; no acknowledged change is lost, and none answers from "
    "before one.",
)
@pytest.mark.parametrize(
    ("place", "count", "rounds", "kills"),
    [
        pytest.param("on disk", 2, 6, 1, marks=TEN_MINUTES),
        pytest.param("in a bucket", 2, 6, 1, marks=[TEN_MINUTES, pytest.mark.full]),
        pytest.param("on disk", SERVERS, *LONG.values, marks=LONG.marks),
    ],
    indirect=["place"],
)
def test_replicas_on_ray_are_as_one_server(
    tmp_path: Path,
    flags: list[str],
    adapter_folders: dict[str, Path],
    count: int,
    rounds: int,
    kills: int,
    record_property: Callable[[str, object], None],
) -> None:
    """The same holds behind the one address of `infuse deploy`."""
    pytest.importorskip("ray")
    # Ray starts many processes in place of one: the others may have no core for seconds.
    longer = ["--replica-lease=20" if flag == LEASE else flag for flag in flags]
    with deployed(tmp_path, count, longer) as deployment:
        hold(deployment, adapter_folders, rounds, kills)
    record_property(FIGURE, f"{rounds} changes, {kills} kills")
