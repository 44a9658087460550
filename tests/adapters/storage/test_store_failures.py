"""How the store deals with damaged files and a full disk; test_bucket.py has bucket failures."""

import errno
import itertools
import json
import os
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from infuse.adapters.errors import StoreFull, StoreUnreachable
from infuse.adapters.storage.revision import DetailsChange, Origin
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore
from tests.adapters.storage.store_contents import content_of, create, reopened, replace, write


@pytest.fixture
def open_store(folder: Path) -> OpenStore:
    return partial(AdapterStore, folder)


# Damage from outside


@pytest.mark.fault(
    "disk",
    "A line of the journal is damaged",
    by="the file",
    promise="It is passed over with a warning; all other adapters are there.",
)
@pytest.mark.parametrize(
    "damage", [b"{", b"[]", b"null", b'{"event":"revision","name":"support"}', b"\xff"], ids=repr
)
def test_a_damaged_line_of_the_journal_is_skipped_with_a_warning(
    store: AdapterStore,
    folder: Path,
    open_store: OpenStore,
    damage: bytes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create(store, "support", "a")
    replace(store, "support", "b")
    create(store, "other", "c")
    journal = folder / "journal.jsonl"
    first, _, *others = journal.read_bytes().splitlines()
    journal.write_bytes(b"\n".join([first, damage, *others, b""]))
    with reopened(store, open_store) as again:
        assert "skipped" in caplog.text
        assert content_of(again, again.current("other")) == "c"
        assert content_of(again, again.current("support")) == "a"


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "../../victim"},
        {"digest": ".."},
        {"number": float("inf")},
        {"dropped": float("inf")},
        {"recipe": [[]]},
    ],
    ids=str,
)
def test_an_event_that_no_store_has_written_is_skipped_and_leads_nowhere(
    folder: Path, change: dict[str, object]
) -> None:
    store = AdapterStore(folder)
    create(store, "support")
    store.close()
    victim = folder.parent / "victim"
    victim.mkdir()
    journal = folder / "journal.jsonl"
    event = json.loads(journal.read_bytes())
    with journal.open("a") as file:
        file.write(json.dumps({**event, "name": "planted", **change}) + "\n")
        file.write("[" * 200_000 + "\n")

    store = AdapterStore(folder)
    if "planted" in store:
        store.delete("planted")
    store.close()

    assert store.names() == ["support"]
    assert victim.is_dir()


@pytest.mark.fault(
    "disk",
    "The last line of the journal is half there",
    by="the file",
    promise="It was never acknowledged, and is removed.",
)
def test_a_last_line_that_a_crash_cut_off_was_never_acknowledged(
    store: AdapterStore, folder: Path, open_store: OpenStore
) -> None:
    create(store, "support", "a")
    with (folder / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"event":"delete","name":"supp')
    with reopened(store, open_store) as again:
        assert again.names() == ["support"]
        again.delete("support")
    with reopened(again, open_store) as third:
        assert third.names() == []


def test_what_an_interrupted_upload_left_behind_is_removed_at_start(
    store: AdapterStore, folder: Path, open_store: OpenStore
) -> None:
    create(store, "support", "a")
    (folder / "staging/half").mkdir()
    (folder / "staging/half/weights").write_text("half")
    (folder / "staging/file").write_text("{")
    (folder / "content/unused").mkdir()
    with reopened(store, open_store) as again:
        assert list((folder / "staging").iterdir()) == []
        assert len(list((folder / "content").iterdir())) == 1
        assert content_of(again, again.current("support")) == "a"


# A full disk


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


CHANGES: dict[str, Callable[[AdapterStore], object]] = {
    "create": lambda store: create(store, "new", "c"),
    "create again": lambda store: create(store, "deleted", "c"),
    "create with known content": lambda store: create(store, "new", "a"),
    "replace": lambda store: replace(store, "support", "c"),
    "roll back": lambda store: store.roll_back("support", 1),
    "describe": lambda store: store.describe("support", DetailsChange(description="x")),
    "delete": lambda store: store.delete("support"),
}


def fail_once(monkeypatch: pytest.MonkeyPatch, call: str, place: int) -> None:
    """Let the disk be full at the `place`-th call of `os.<call>` from now on."""
    real, calls = getattr(os, call), itertools.count()

    def full(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == place:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, full)


@contextmanager
def full_at(monkeypatch: pytest.MonkeyPatch, call: str, place: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        fail_once(patch, call, place)
        yield


def change_until_there_is_room(
    folder: Path, change: str, attempts: Iterable[AbstractContextManager[None]]
) -> None:
    """Try a change within one after the other, until it succeeds. Where the disk has no room for
    it, everything is as it was: on the disk, in memory and at the next start."""
    store = AdapterStore(folder)
    create(store, "support", "a")
    current, _ = replace(store, "support", "b")
    create(store, "deleted", "d")
    store.delete("deleted")
    before = everything(folder)
    for attempt in attempts:
        with attempt:
            try:
                CHANGES[change](store)
                break
            except StoreFull:
                pass
        assert everything(folder) == before
        assert store.current("support") == current
        store.close()
        store = AdapterStore(folder)
        assert store.names() == ["support"]
        assert content_of(store, store.current("support")) == "b"
    store.close()
    assert everything(folder) != before


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_that_is_full_at_any_moment_leaves_everything_as_it_was(
    folder: Path, change: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the calls that take room fails once, until none is left and the change succeeds."""
    places = itertools.count()
    change_until_there_is_room(folder, change, (full_at(monkeypatch, call, n) for n in places))


@pytest.mark.fault(
    "disk",
    "A file may not grow any more",
    by="`RLIMIT_FSIZE`",
    promise="The upload says that the disk is full, and nothing of it stays.",
)
def test_an_upload_that_the_disk_cannot_hold_is_named_and_removed(
    store: AdapterStore, folder: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
    try:
        with pytest.raises(StoreFull, match="make room"):
            create(store, "large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert everything(folder).keys() == {"lock", "journal.jsonl"}
    assert create(store, "large").number == 1


def test_another_failure_of_the_disk_is_not_called_full(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreUnreachable, match="Input/output error"):
        create(store, "support")
    assert "support" not in store


def test_the_journal_says_who_changed_what_and_when(store: AdapterStore, folder: Path) -> None:
    with store.staging() as staged:
        write(staged, "a")
        revision = store.create("support", staged, Origin(by="ops"))
    store.describe("support", DetailsChange(tags=("de",)), by="ops")
    store.delete("support", by="root")
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]

    assert [(e["event"], e["by"]) for e in events] == [
        ("revision", "ops"),
        ("details", "ops"),
        ("delete", "root"),
    ]
    assert (events[0]["number"], events[0]["digest"]) == (1, revision.digest)
    assert all(datetime.fromisoformat(event["time"]).tzinfo for event in events)
