"""Backups of stores in folders and in buckets, while servers change them, and what is restored."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from infuse.adapters.errors import (
    BackupRefused,
    RevisionDamaged,
    StoreDamaged,
    StoreLocked,
    StoreUnreachable,
)
from infuse.adapters.storage.backup import back_up, restore
from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.storage.replicas import shared_folder, shared_objects
from tests.adapters.storage.store_contents import create, replace
from tests.bad_s3 import BadS3, bad_s3

REPOSITORY = Path(__file__).parents[3]
KEEP = 3
State = dict[str, dict[int, bytes]]
"""Name -> revision number -> what a server reads of its weights."""


@dataclass(frozen=True)
class Place:
    where: Path | str
    caches: Path

    def open(self) -> AdapterStore:
        if isinstance(self.where, Path):
            return AdapterStore(self.where, KEEP)
        cache = self.caches / self.where.rpartition("/")[2]
        return AdapterStore(BucketStorage(Objects.at(self.where), cache), KEEP)

    def share(self, server: int) -> AdapterStore:
        if isinstance(self.where, Path):
            return AdapterStore(shared_folder(self.where), KEEP)
        objects = Objects.at(self.where)
        return AdapterStore(shared_objects(objects, self.caches / f"{server}"), KEEP)


MakePlace = Callable[..., Place]


@pytest.fixture
def make_place(s3: str, tmp_path: Path) -> MakePlace:
    numbers = count()

    def make_place(kind: str) -> Place:
        name = f"place{next(numbers)}"
        return Place(tmp_path / name if kind == "folder" else f"{s3}/{name}", tmp_path / "caches")

    return make_place


@pytest.fixture
def proxy(s3_server: str) -> Iterator[BadS3]:
    with bad_s3(s3_server) as proxy:
        yield proxy


KINDS = ("folder", "bucket")
FROM = pytest.mark.parametrize("kind", KINDS)
TO = pytest.mark.parametrize("other", KINDS)


def state_of(store: AdapterStore) -> State:
    """Read everything, and compare it with its digests."""
    return {
        name: {
            each.number: store.read(each, ["weights"])["weights"] for each in store.revisions(name)
        }
        for name in store.names()
    }


def fill(store: AdapterStore) -> None:
    for name in "abc":
        create(store, name, name)
    replace(store, "a", "b")
    store.roll_back("a", 1)
    store.describe("b", DetailsChange(description="of b", pinned=True))
    store.delete("c")


def made(place: Place) -> State:
    with closing(place.open()) as store:
        fill(store)
        return state_of(store)


@FROM
@TO
def test_what_is_restored_answers_as_what_was_backed_up_and_lives_on(
    make_place: MakePlace, kind: str, other: str
) -> None:
    live, saved, again = make_place(kind), make_place(other), make_place(other)
    expected = made(live)
    backup = back_up(live.where, saved.where)
    assert (backup.adapters, backup.damaged) == (2, [])
    assert restore(saved.where, again.where) == backup
    with closing(again.open()) as store:
        assert state_of(store) == expected
        assert store.details("b").description == "of b"
        assert store.was_deleted("c")
        replace(store, "b", "b2")
        assert create(store, "c", "a").number == 2
        changed = state_of(store)
    with closing(again.open()) as store:
        assert state_of(store) == changed


@FROM
@TO
def test_a_restored_store_can_be_backed_up_to_the_other_kind_and_back(
    make_place: MakePlace, kind: str, other: str
) -> None:
    place = make_place(kind)
    made(place)
    for turn, each in enumerate((other, kind, other)):
        saved, again = make_place(each), make_place(each)
        back_up(place.where, saved.where)
        restore(saved.where, again.where)
        with closing(again.open()) as store:
            replace(store, "a", f"{turn}")
            replace(store, "b", "a")
            expected = state_of(store)
        place = again
    with closing(place.open()) as store:
        assert state_of(store) == expected


def test_a_backup_has_nothing_of_a_deleted_adapter(make_place: MakePlace) -> None:
    live, saved = make_place("folder"), make_place("folder")
    made(live)
    back_up(live.where, saved.where)
    assert isinstance(saved.where, Path)
    texts = [path.read_text() for path in saved.where.glob("content/*/weights")]
    assert sorted({text[0] for text in texts}) == ["a", "b"]


# Beside changes


@FROM
def test_a_content_that_is_removed_before_it_is_copied_leads_to_a_later_moment(
    make_place: MakePlace, kind: str, proxy: BadS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server deletes everything else before a first content has arrived in the backup."""
    live, saved, again = make_place(kind), make_place("bucket"), make_place("folder")
    with closing(live.open()) as store:
        for number in range(20):
            create(store, f"a{number}", f"{number}")
        changing, changed = threading.Lock(), threading.Event()

        def change(request: str) -> None:
            if not request.startswith("PUT") or "/content/" not in request:
                return
            if changing.acquire(blocking=False):
                for number in range(19):
                    store.delete(f"a{number}")
                create(store, "late", "late")
                changed.set()
            assert changed.wait(60)

        proxy.fault = change
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        back_up(live.where, saved.where)
        expected = state_of(store)
    restore(saved.where, again.where)
    with closing(again.open()) as store:
        assert state_of(store) == expected
        assert store.names() == ["a19", "late"]


@FROM
@pytest.mark.parametrize("servers", [1, 2])
def test_beside_changes_a_backup_is_the_store_at_one_moment_since_it_began(
    make_place: MakePlace, kind: str, servers: int
) -> None:
    live = make_place(kind)
    with ExitStack() as stack:
        opened = [live.open() if servers == 1 else live.share(n) for n in range(servers)]
        changes = Changes([stack.enter_context(closing(store)) for store in opened])
        stack.enter_context(changes)
        for _ in range(6):
            changes.allow(40)
            before = changes.wait_for_more(6)
            saved, again = make_place("folder"), make_place("folder")
            back_up(live.where, saved.where)
            restore(saved.where, again.where)
            with closing(again.open()) as store:
                found = state_of(store)
            # The last event that was backed up may not be acknowledged yet.
            changes.allow(2)
            changes.wait_for_more(2)
            assert found in changes.states[before:]


class Changes:
    """A thread that changes stores, one change after the other, and keeps each state. It makes as
    many as it is allowed: a backup that has to be faster than it would test the machine."""

    def __init__(self, stores: list[AdapterStore]) -> None:
        self.states: list[State] = [{}]
        self._allowed = 0
        self._stores = stores
        self._more = threading.Condition()
        self._ended = threading.Event()
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> None:
        self._done = self._thread.submit(self._run)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.allow(1)
        self._thread.shutdown()
        self._done.result()

    def allow(self, changes: int) -> None:
        """Allow more changes."""
        with self._more:
            self._allowed += changes
            self._more.notify_all()

    def wait_for_more(self, changes: int) -> int:
        """Wait for changes; return the index of the newest state."""
        with self._more:
            wanted = len(self.states) + changes
            self._more.wait_for(lambda: len(self.states) >= wanted or self._done.done())
            assert not self._done.done(), self._done.result()
            return len(self.states) - 1

    def _run(self) -> None:
        for number in count():
            with self._more:
                self._more.wait_for(lambda: self._allowed > 0)
                self._allowed -= 1
            if self._ended.is_set():
                return
            store, name = self._stores[number % len(self._stores)], f"a{number % 5}"
            if name not in store:
                create(store, name, f"{number}")
            elif number % 7 == 0:
                store.delete(name)
            elif number % 11 == 0:
                store.roll_back(name, store.revisions(name)[-1].number)
            else:
                replace(store, name, f"{number}")
            with self._more:
                self.states.append(state_of(store))
                self._more.notify_all()


# Damage


@pytest.mark.fault(
    "disk",
    "Stored files are damaged when a backup is made",
    by="the files, on the disk and in the bucket",
    promise="The backup names them and has all others.",
)
@FROM
def test_a_damaged_content_is_named_and_left_out_and_all_others_are_there(
    make_place: MakePlace, kind: str
) -> None:
    live, saved, again = make_place(kind), make_place(kind), make_place(kind)
    expected = made(live)
    change(live, "content/", lambda data: data.replace(b"bbb", b"xxx"))
    backup = back_up(live.where, saved.where)
    assert backup.damaged == ["a@2", "b@1"]
    assert restore(saved.where, again.where) == backup
    with closing(again.open()) as store:
        for name, number in (("a", 2), ("b", 1)):
            with pytest.raises(RevisionDamaged):
                store.read(store.revision(name, number), ())
        replace(store, "b", "b")
        assert state_of(store) == expected


def change(place: Place, part: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change files or objects from outside; None removes them."""
    if isinstance(place.where, Path):
        for path in (each for each in place.where.rglob("*") if each.is_file()):
            if part in str(path) and (data := path.read_bytes()) != (new := change(data)):
                path.unlink() if new is None else path.write_bytes(new)
        return
    outside = from_url(place.where, client_options={"allow_http": True})
    with closing(Objects.at(place.where)) as objects:
        for key in (each for each in objects.list("") if part in each):
            data = objects.get(key)
            assert data is not None
            if (new := change(data)) is None:
                objects.delete([key])
            elif new != data:
                obstore.put(outside, key, new)


def cut(data: bytes) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join([*lines[:1], *lines[2:]])


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "a content was changed": ("/weights", lambda _: b"?", "files of a@3, a@2, a@1, b@1"),
    "a content is gone": ("/config.json", lambda _: None, "files of a@3, a@2, a@1, b@1"),
    "the journal was changed": ("journal.jsonl", lambda d: d.replace(b"of b", b"of c"), "journal"),
    "an event is gone": ("journal.jsonl", cut, "journal"),
    "the journal was cut off": ("journal.jsonl", lambda data: data[:-30], "journal"),
    "the manifest was changed": ("backup.json", lambda _: b"{}", "backup.json is damaged"),
}


@pytest.mark.fault(
    "disk",
    "A backup is damaged",
    by="its files, in a folder and in a bucket",
    promise="A restore is refused before it writes anything.",
)
@FROM
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_backup_is_refused_before_anything_is_written(
    make_place: MakePlace, kind: str, damage: str
) -> None:
    live, saved, again = make_place(kind), make_place(kind), make_place("folder")
    made(live)
    back_up(live.where, saved.where)
    part, how, said = DAMAGES[damage]
    change(saved, part, how)
    with pytest.raises(StoreDamaged, match=said):
        restore(saved.where, again.where)
    assert isinstance(again.where, Path)
    assert list(again.where.rglob("*")) == []


@FROM
def test_an_interrupted_backup_is_no_backup(make_place: MakePlace, kind: str) -> None:
    live, saved, again = make_place(kind), make_place(kind), make_place(kind)
    made(live)
    back_up(live.where, saved.where)
    change(saved, "backup.json", lambda _: None)
    with pytest.raises(BackupRefused, match=r"no whole backup in .* make it again"):
        restore(saved.where, again.where)
    with pytest.raises(BackupRefused, match=r"a backup without backup\.json was interrupted"):
        back_up(live.where, saved.where)


# What is there already


@FROM
@TO
def test_nothing_that_is_there_is_written_over(
    make_place: MakePlace, kind: str, other: str
) -> None:
    live, saved, used = make_place(kind), make_place(kind), make_place(other)
    made(live)
    back_up(live.where, saved.where)
    with closing(used.open()) as store:
        create(store, "mine", "m")
        expected = state_of(store)
    with pytest.raises(BackupRefused, match="already: give an empty folder or another prefix"):
        back_up(live.where, used.where)
    with pytest.raises(BackupRefused, match="already: restore to an empty folder or another"):
        restore(saved.where, used.where)
    with closing(used.open()) as store:
        assert state_of(store) == expected


@FROM
def test_where_there_is_no_store_there_is_nothing_to_back_up(
    make_place: MakePlace, kind: str
) -> None:
    nowhere, saved = make_place(kind), make_place("folder")
    with pytest.raises(BackupRefused, match=r"There (are no adapters|is no folder) .* check the"):
        back_up(nowhere.where, saved.where)


def test_a_restore_is_refused_where_a_server_runs(make_place: MakePlace) -> None:
    live, saved, again = (make_place("folder") for _ in range(3))
    made(live)
    back_up(live.where, saved.where)
    with closing(again.open()) as store:
        with pytest.raises(StoreLocked, match="another server uses"):
            restore(saved.where, again.where)
        assert store.names() == []
    restore(saved.where, again.where)


def test_a_server_is_refused_where_a_restore_runs(
    make_place: MakePlace, proxy: BadS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, saved, again = make_place("folder"), make_place("bucket"), make_place("folder")
    expected = made(live)
    back_up(live.where, saved.where)
    refused: list[str] = []

    def start(_: str) -> None:
        if isinstance(again.where, Path) and (again.where / "lock").exists():
            try:
                again.open()
            except StoreLocked as error:
                refused.append(str(error))

    proxy.fault = start
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    restore(saved.where, again.where)
    assert refused
    with closing(again.open()) as store:
        assert state_of(store) == expected


# Interruptions


@pytest.mark.fault(
    "bucket",
    "The bucket fails from any request of a restore on",
    by="a proxy before the bucket",
    promise="A server sees nothing of it, and another attempt restores it.",
)
def test_a_restore_that_a_bucket_interrupts_anywhere_leaves_nothing_to_be_seen(
    make_place: MakePlace, s3_server: str, proxy: BadS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    live, saved = make_place("folder"), make_place("folder")
    expected = made(live)
    back_up(live.where, saved.where)
    interrupted = 0
    for allowed in count():
        again, left = make_place("bucket"), count()

        def fault(request: str, allowed: int = allowed, left: Iterator[int] = left) -> str | None:
            is_write = request.startswith("PUT") and "/lease/" not in request
            return "refuses" if is_write and next(left) >= allowed else None

        proxy.fault = fault  # type: ignore[assignment]
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        try:
            restore(saved.where, again.where)
        except StoreUnreachable:
            interrupted += 1
        else:
            break
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
        if allowed % 2:
            # A second attempt, where no server has started meanwhile.
            restore(saved.where, again.where)
        with closing(again.open()) as store:
            assert state_of(store) == (expected if allowed % 2 else {})
    assert interrupted > 3


@pytest.mark.fault(
    "process",
    "A restore is killed",
    by="SIGKILL after so many contents",
    promise="A server sees all of it or nothing, and another attempt restores it.",
)
def test_a_restore_that_is_killed_leaves_nothing_to_be_seen(make_place: MakePlace) -> None:
    live, saved = make_place("folder"), make_place("folder")
    with closing(live.open()) as store:
        for number in range(60):
            create(store, f"a{number}", f"{number}")
        expected = state_of(store)
    back_up(live.where, saved.where)
    seen = []
    for contents in (0, 1, 20, 55):
        again = make_place("folder")
        assert isinstance(again.where, Path)
        kill_restore(saved, again.where, contents)
        whole = (again.where / "journal.jsonl").exists()
        with closing(again.open()) as store:
            assert state_of(store) == (expected if whole else {})
            seen.append(len(store))
        if not whole:
            restore(saved.where, again.where)
            with closing(again.open()) as store:
                assert state_of(store) == expected
    assert 0 in seen


def kill_restore(saved: Place, store: Path, contents: int) -> None:
    """Kill a restore once it has written so many contents."""
    code = "from pathlib import Path; from infuse.adapters.storage.backup import restore; "
    code += f"restore(Path({str(saved.where)!r}), Path({str(store)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    while process.poll() is None and len(list(store.glob("content/*"))) < contents:
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_what_is_restored_on_another_machine_needs_nothing_of_the_first(
    make_place: MakePlace,
) -> None:
    live, saved, again = make_place("bucket"), make_place("folder"), make_place("bucket")
    expected = made(live)
    back_up(live.where, saved.where)
    shutil.rmtree(live.caches)
    change(live, "", lambda _: None)
    restore(saved.where, again.where)
    with closing(again.open()) as store:
        assert state_of(store) == expected
