"""Servers behind a load balancer are replaced by another release and back, under requests."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infuse.adapters.storage.audit import audit
from tests.api.replicas import Release, Replica, Replicas, replicas
from tests.api.stores import COMPLETIONS, Place
from tests.api.stores import place as place
from tests.api.test_replicas import PAUSE_BESIDE_A_START, Changes, under_requests
from tests.api.test_replicas import flags as flags
from tests.api.test_streaming import eventually
from tests.releases import unpacked

SERVERS = 2
LONG = {
    "model": "tiny",
    "prompt": "The order arrived",
    "max_tokens": 100,
    "ignore_eos": True,
    "stream": True,
}


@pytest.fixture
def before(tmp_path: Path) -> Release:
    """The earlier release, which kept no usage in a folder."""
    starter = [f"tests/{file}.py" for file in ("__init__", "api/__init__", "api/replica_starter")]
    folder = tmp_path / "before"
    folder.mkdir()
    return Release(unpacked(folder, "adapters", "server", *starter), ("merges", "adapters-cache"))


class Rotation:
    """The servers that a load balancer sends requests to."""

    def __init__(self, servers: list[Replica]) -> None:
        self._servers = tuple(servers)
        self._known: dict[int, tuple[Replica, ...]] = {}
        """Client -> the servers that it chose from latest."""

    @property
    def alive(self) -> tuple[Replica, ...]:
        servers = self._known[threading.get_ident()] = self._servers
        return servers

    def replace(self, _: Replica) -> None:
        raise AssertionError("no server is killed here")

    def take_out(self, server: Replica) -> None:
        """Return once no client has a request with the server."""
        self._servers = tuple(each for each in self._servers if each is not server)
        known = self._known
        assert eventually(lambda: all(each is self._servers for each in known.copy().values()))

    def put_in(self, server: Replica) -> None:
        assert eventually(lambda: server.client.get("/health/ready").status_code == 200)
        self._servers = (*self._servers, server)


def go_over(rotation: Rotation, number: int, old: Replicas, new: Replicas) -> None:
    """Replace a server by one of another release, in its folders. It ends what it has begun."""
    leaving = old.all[0]
    with streaming(leaving.client) as events:
        rotation.take_out(leaving)
        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(old.stop, leaving)
            assert list(events)[-1] == "data: [DONE]"
            stopping.result()
    new.wait_for(*new.begin(number))
    rotation.put_in(new.all[-1])


@contextmanager
def streaming(client: httpx.Client) -> Iterator[Iterator[str]]:
    with client.stream("POST", COMPLETIONS, json=LONG) as answer:
        events = (line for line in answer.iter_lines() if line)
        next(events)
        yield events


@contextmanager
def changing(changes: Changes) -> Iterator[None]:
    """Within, adapters are uploaded, replaced, rolled back and deleted, one after the other."""
    ended = threading.Event()

    def change() -> None:
        while not ended.is_set():
            changes.round(kill=False)

    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(change)
        try:
            yield
        finally:
            ended.set()
        made.result()


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "place", ["on disk", pytest.param("in a bucket", marks=pytest.mark.full)], indirect=True
)
def test_servers_go_to_the_next_release_and_back_and_no_request_fails(
    tmp_path: Path,
    before: Release,
    flags: list[str],
    adapter_folders: dict[str, Path],
    place: Place,
) -> None:
    """Nor is an acknowledged change lost, or an answer from before one."""
    with replicas(tmp_path, SERVERS, flags, before) as old, replicas(tmp_path, 0, flags) as new:
        rotation = Rotation(old.all)
        changes = Changes(rotation, adapter_folders, seed=0)
        changes.pause = PAUSE_BESIDE_A_START
        with under_requests(changes), changing(changes):
            for source, target in ((old, new), (new, old)):
                for number in range(SERVERS):
                    go_over(rotation, number, source, target)
    story = changes.story
    made = sum(story.moves.values()) // 2
    print(f"{made} changes, {story.answered} answers")
    assert (story.stale, story.lost, story.failed) == ([], [], [])
    assert all(len(texts) == 1 for texts in story.texts.values())
    assert min(made, story.answered) > 8 * SERVERS
    assert all("is not chained" in fault for fault in audit(place.settings["adapters_dir"]).faults)
