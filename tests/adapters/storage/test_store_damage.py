"""Stored files that were damaged, and a folder that was removed."""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from infuse.adapters.errors import (
    AdapterError,
    RevisionDamaged,
    StoreUnreachable,
    UnknownRevision,
)
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore, open_bucket
from tests.adapters.storage.store_contents import content_of, create, reopened, replace

FILES = ("config.json", "weights")


def flip(file: Path) -> None:
    """Flips a bit in each of two bytes."""
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    data[-1] ^= 64
    file.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bytes": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"a"),
    "gone": lambda file: file.unlink(),
    "renamed": lambda file: file.rename(file.with_name("other")),
    "one more": lambda file: file.with_name("tokenizer.json").write_text("{}"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "all gone": lambda file: shutil.rmtree(file.parent),
}


def damage(folder: Path, how: str, file: str = "weights") -> None:
    """Damage every copy of a file, on this machine and in the bucket."""
    for each in {*folder.glob(f"content/**/{file}"), *folder.parent.glob(f"*/content/*/{file}")}:
        DAMAGE[how](each)


@pytest.mark.fault(
    "disk",
    "A stored file is changed, cut, longer, gone, renamed, a folder, or one more",
    by="the folder, on the disk and in the bucket",
    promise="The revision is never read; the error says to upload the files again.",
)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_revision_is_never_read(
    store: AdapterStore, folder: Path, open_store: OpenStore, how: str, file: str
) -> None:
    revision = create(store, "support", "a")
    assert store.read(revision, FILES).keys() == {*FILES}
    damage(folder, how, file)
    with reopened(store, open_store) as again:
        for read in (lambda: again.read(revision, FILES), lambda: again.verified(revision)):
            with pytest.raises(RevisionDamaged, match="upload the same files again"):
                read()
        assert again.is_damaged(revision)
        assert again.damaged == 1


def test_damage_is_told_once(
    store: AdapterStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    revision = create(store, "support", "a")
    create(store, "other", "b")
    [weights] = [f for f in folder.glob("content/**/weights") if f.read_text() == "a" * 100]
    for each in (weights, *folder.with_name("cache").glob(f"content/{revision.digest}/weights")):
        flip(each)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            with pytest.raises(RevisionDamaged):
                store.read(revision, FILES)
    assert caplog.text.count("'support@1'") == 1
    assert content_of(store, store.current("other")) == "b"
    assert not store.is_damaged(store.current("other"))


@pytest.mark.parametrize("seen", [True, False])
def test_the_same_upload_heals_what_is_damaged(
    store: AdapterStore, folder: Path, open_store: OpenStore, seen: bool
) -> None:
    revision = create(store, "support", "a")
    damage(folder, "flipped bytes")
    if seen:
        with pytest.raises(RevisionDamaged):
            store.read(revision, FILES)
    assert replace(store, "support", "a") == (revision, True)
    assert store.read(revision, FILES)["weights"] == b"a" * 100
    assert store.damaged == 0
    with reopened(store, open_store) as again:
        shutil.rmtree(folder.with_name("cache"), ignore_errors=True)
        assert again.read(revision, FILES)["weights"] == b"a" * 100
        assert replace(again, "support", "a") == (revision, False)


def test_a_new_name_with_the_same_content_heals_it_too(store: AdapterStore, folder: Path) -> None:
    revision = create(store, "support", "a")
    damage(folder, "flipped bytes")
    with pytest.raises(RevisionDamaged):
        store.read(revision, FILES)
    twin = create(store, "twin", "a")
    assert store.read(twin, FILES) == store.read(revision, FILES)
    assert store.damaged == 0


def test_a_damaged_copy_of_what_a_bucket_has_is_fetched_again(folder: Path) -> None:
    store = open_bucket(folder)
    revision = create(store, "support", "a")
    flip(folder.with_name("cache") / "content" / revision.digest / "weights")
    assert store.read(revision, FILES)["weights"] == b"a" * 100
    assert store.damaged == 0
    store.close()


def test_what_is_deleted_while_it_is_read_is_not_damaged(store: AdapterStore) -> None:
    revision = create(store, "support", "a")
    store.delete("support")
    create(store, "support", "b")
    with pytest.raises(UnknownRevision):
        store.read(revision, FILES)
    assert store.damaged == 0


def test_a_damaged_content_goes_with_its_last_revision(store: AdapterStore, folder: Path) -> None:
    revision = create(store, "support", "a")
    damage(folder, "flipped bytes")
    with pytest.raises(RevisionDamaged):
        store.read(revision, FILES)
    store.delete("support")
    assert store.damaged == 0
    assert store.read(create(store, "support", "a"), FILES)["weights"] == b"a" * 100


# A folder that was removed

TAKEN: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "replaced": lambda folder: (
        folder.rename(folder.with_name("elsewhere")),
        shutil.copytree(folder.with_name("elsewhere"), folder),
    ),
    "journal removed": lambda folder: (folder / "journal.jsonl").unlink(),
    "journal replaced": lambda folder: (
        shutil.copy(folder / "journal.jsonl", folder / "copy"),
        (folder / "copy").rename(folder / "journal.jsonl"),
    ),
    "lock removed": lambda folder: (folder / "lock").unlink(),
    "contents removed": lambda folder: shutil.rmtree(folder / "content"),
}
CHANGES: dict[str, Callable[[AdapterStore], object]] = {
    "create": lambda store: create(store, "new", "c"),
    "replace": lambda store: replace(store, "support", "c"),
    "roll back": lambda store: store.roll_back("support", 1),
    "describe": lambda store: store.describe("support", DetailsChange(description="x")),
    "delete": lambda store: store.delete("support"),
}


@pytest.mark.parametrize("how", TAKEN)
def test_no_change_is_taken_into_a_folder_that_is_gone(folder: Path, how: str) -> None:
    store = AdapterStore(folder)
    first = create(store, "support", "a")
    current, _ = replace(store, "support", "b")
    TAKEN[how](folder)
    for change in CHANGES.values():
        with pytest.raises(StoreUnreachable, match=r"put it back as it was, or restart"):
            change(store)
    with pytest.raises(StoreUnreachable):
        store.check()
    assert (store.current("support"), store.names()) == (current, ["support"])
    if not (folder / "content").exists():
        with pytest.raises(StoreUnreachable):
            store.read(first, FILES)
        assert store.damaged == 0
    store.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_that_was_put_back_takes_changes_again(folder: Path, change: str) -> None:
    store = AdapterStore(folder)
    create(store, "support", "a")
    replace(store, "support", "b")
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(AdapterError):
        CHANGES[change](store)
    before = (folder.with_name("elsewhere") / "journal.jsonl").read_bytes()
    assert before.count(b"\n") == 2
    folder.with_name("elsewhere").rename(folder)
    store.check()
    CHANGES[change](store)
    names = store.names()
    store.close()
    again = AdapterStore(folder)
    assert again.names() == names
    again.close()


def test_a_journal_that_goes_while_it_is_written_acknowledges_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(folder)
    create(store, "support", "a")
    real = os.fsync

    def moving(file: int) -> None:
        real(file)
        if folder.exists():
            folder.rename(folder.with_name("gone"))

    monkeypatch.setattr(os, "fsync", moving)
    with pytest.raises(StoreUnreachable):
        store.delete("support")
    assert store.names() == ["support"]
    assert (folder.with_name("gone") / "journal.jsonl").read_bytes().count(b"\n") == 1
    store.close()
