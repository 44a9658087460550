"""Killed at any moment, the store is found at its old or its new state, whole."""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

from infuse.adapters.storage.store import AdapterStore
from tests.adapters.storage.crash_worker import FILES, storage_at
from tests.disks import disk, mounts
from tests.reliability_page import FIGURE

RecordProperty = Callable[[str, object], None]

REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class Name:
    """The state of a name: its last number, and its content unless it is deleted."""

    number: int = 0
    content: str | None = None

    def after(self, change: str, content: str) -> "Name":
        if change == "delete":
            return replace(self, content=None)
        if content == self.content:
            return self
        return Name(self.number + 1, content)


@dataclass(frozen=True)
class Story:
    """The changes that a worker acknowledged, and the one during which it was killed."""

    ends: dict[str, Name]
    pending: tuple[str, Name] | None


@dataclass(frozen=True)
class Place:
    """Where the store is, and the longest that a worker runs after its last line, in seconds."""

    folder: Path
    """The folder on this machine: the store itself, or the cache of a bucket."""
    url: str | None
    longest: float
    beside_a_kill: Callable[[psutil.Process], AbstractContextManager[object]] = nullcontext
    """What else happens when the worker is killed."""

    @property
    def arguments(self) -> tuple[str, str | None]:
        return (str(self.folder), None) if self.url is None else (self.url, str(self.folder))


def run_and_kill(place: Place, seed: int, before: dict[str, Name], moment: random.Random) -> Story:
    """Kill the worker after a number of lines, and a random time later.

    On disk the worker starts fast: without site-packages, for that store needs none.
    """
    where, cache = place.arguments
    worker = subprocess.Popen(
        [
            *(sys.executable, *(["-S"] if cache is None else [])),
            *("-m", "tests.adapters.storage.crash_worker", where, str(seed)),
            *([] if cache is None else [cache]),
        ],
        stdout=subprocess.PIPE,
        bufsize=0,
        cwd=REPOSITORY,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"starts\n"
    lines = [worker.stdout.readline().decode() for _ in range(moment.randrange(16))]
    with suppress(subprocess.TimeoutExpired):
        worker.communicate(timeout=moment.uniform(0, place.longest))
    assert worker.poll() is None, "the worker ended by itself"
    with place.beside_a_kill(psutil.Process(worker.pid)):
        worker.kill()
        lines += worker.communicate()[0].decode().splitlines()
    return read_story(lines, before)


def read_story(lines: list[str], before: dict[str, Name]) -> Story:
    states, pending = dict(before), None
    for line in lines:
        match line.split():
            case ["begins", change, name, content]:
                pending = name, states.get(name, Name()).after(change, content)
            case ["ends"]:
                assert pending is not None
                states[pending[0]] = pending[1]
                pending = None
    return Story(states, pending)


def read_all(place: Place) -> dict[str, Name]:
    """Return what a restart finds. Every file of every name must be whole."""
    store = AdapterStore(storage_at(*place.arguments), keep_revisions=3)
    try:
        assert list((place.folder / "staging").iterdir()) == []
        found = {}
        for name in store.names():
            revision = store.current(name)
            files = sorted(store.files(revision).iterdir())
            assert [file.name for file in files] == [f"file{index}" for index in range(FILES)]
            content = files[0].read_text().split()[0]
            for index, file in enumerate(files):
                assert file.read_text() == f"{content} {index}\n" * 1000
            found[name] = Name(revision.number, content)
        return found
    finally:
        store.close()


@pytest.mark.fault(
    "process",
    "A process is killed in the midst of changes on a disk",
    by="SIGKILL at a random moment",
    promise="Every acknowledged change is there at the next start, and the one that was "
    "interrupted is there whole or not at all.",
)
@pytest.mark.parametrize("kills", [30, pytest.param(100, marks=pytest.mark.full)])
def test_after_many_kills_nothing_acknowledged_is_missing_and_nothing_is_half_there(
    tmp_path: Path, kills: int, record_property: RecordProperty
) -> None:
    check_after_kills(Place(tmp_path, None, longest=0.004), kills)
    record_property(FIGURE, f"{kills} kills")


@pytest.mark.fault(
    "process",
    "A process is killed in the midst of changes in a bucket",
    by="SIGKILL at a random moment",
    promise="As on a disk.",
)
@pytest.mark.parametrize("kills", [12, pytest.param(60, marks=pytest.mark.full)])
def test_after_as_many_kills_the_same_is_true_in_a_bucket(
    s3: str, tmp_path: Path, kills: int, record_property: RecordProperty
) -> None:
    check_after_kills(Place(tmp_path, s3, longest=0.1), kills)
    record_property(FIGURE, f"{kills} kills")


@pytest.mark.fault(
    "disk",
    "The machine loses its power in the midst of changes",
    by="ext4's shutdown without its log, at a random moment",
    promise="As where the process is killed: the disk has every acknowledged change.",
)
@mounts
@pytest.mark.parametrize("losses", [8, pytest.param(100, marks=pytest.mark.full)])
def test_after_as_many_losses_of_power_the_same_is_true(
    tmp_path: Path, losses: int, record_property: RecordProperty
) -> None:
    with disk(tmp_path) as made:

        @contextmanager
        def power_is_lost(worker: psutil.Process) -> Iterator[None]:
            # Linux takes a sync that is under way then for one that has been made.
            worker.suspend()
            while worker.status() != psutil.STATUS_STOPPED:
                pass
            made.lose_power()
            yield
            made.unmount()
            made.mount()

        place = Place(made.folder, None, longest=0.02, beside_a_kill=power_is_lost)
        check_after_kills(place, losses)
    record_property(FIGURE, f"{losses} losses of power")


def check_after_kills(place: Place, kills: int) -> None:
    moment = random.Random(0)
    known: dict[str, Name] = {}
    acknowledged = interrupted = 0
    for kill in range(kills):
        story = run_and_kill(place, kill, known, moment)
        found = read_all(place)
        acknowledged += story.ends != known
        known = dict(story.ends)
        if story.pending is not None:
            interrupted += 1
            name, new = story.pending
            if found.get(name, replace(new, content=None)) == new:
                known[name] = new
        alive = {name: state for name, state in known.items() if state.content is not None}
        assert found == alive, f"kill {kill}: {story}"
    assert acknowledged > kills // 10
    assert interrupted > kills // 10
