"""Revisions of a name: listed, rolled back to, and dropped; what an operator says of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import RevisionConflict, UnknownAdapter, UnknownRevision
from adapters.revision import Details, Origin
from adapters.store import AdapterStore
from tests.adapters.buckets import OpenStore
from tests.adapters.store_contents import content_of, create, reopened, replace, write


@pytest.fixture
def store(open_store: OpenStore) -> Iterator[AdapterStore]:
    store = open_store(keep_revisions=3)
    yield store
    store.close()


def numbers(store: AdapterStore, name: str = "support") -> list[int]:
    return [revision.number for revision in store.revisions(name)]


def test_revisions_are_listed_newest_first(store: AdapterStore) -> None:
    create(store, "support", "a")
    replace(store, "support", "b")

    assert numbers(store) == [2, 1]


def test_a_rollback_is_a_new_revision_with_the_old_content(store: AdapterStore) -> None:
    first = create(store, "support", "a")
    replace(store, "support", "b")
    back, is_new = store.roll_back("support", 1, by="ops")

    assert (back.number, is_new, back.digest) == (3, True, first.digest)
    assert back.origin == Origin(source="rollback to 1", by="ops")
    assert content_of(store, store.current("support")) == "a"


def test_a_rollback_to_the_current_content_changes_nothing(store: AdapterStore) -> None:
    current = create(store, "support", "a")

    assert store.roll_back("support", 1) == (current, False)


def test_a_rollback_keeps_the_recipe(store: AdapterStore) -> None:
    with store.staging() as staged:
        write(staged, "a")
        store.create("support", staged, Origin(source="combine", recipe={"method": "ties"}))
    replace(store, "support", "b")

    assert store.roll_back("support", 1)[0].origin.recipe == {"method": "ties"}


def test_a_rollback_needs_a_revision_and_the_right_etag(store: AdapterStore) -> None:
    first = create(store, "support", "a")
    replace(store, "support", "b")
    with pytest.raises(UnknownRevision):
        store.roll_back("support", 7)
    with pytest.raises(UnknownAdapter):
        store.roll_back("nobody", 1)
    with pytest.raises(RevisionConflict):
        store.roll_back("support", 1, if_match=first.etag)


def test_the_etag_of_an_equal_content_that_came_back_is_another(store: AdapterStore) -> None:
    """Whoever looked before both changes must not overwrite them."""
    first = create(store, "support", "a")
    replace(store, "support", "b")
    back, _ = store.roll_back("support", 1)

    assert back.etag != first.etag


def test_only_the_last_revisions_stay_and_the_contents_of_others_go(
    store: AdapterStore, folder: Path, open_store: OpenStore
) -> None:
    create(store, "support", "a")
    for content in "bcdef":
        replace(store, "support", content)

    assert numbers(store) == [6, 5, 4]
    assert len(list((folder / "content").iterdir())) == 3
    with reopened(store, open_store) as again:
        assert numbers(again) == [6, 5, 4]
        assert [content_of(again, r) for r in again.revisions("support")] == ["f", "e", "d"]


def test_a_content_that_an_older_and_a_newer_revision_share_stays(store: AdapterStore) -> None:
    create(store, "support", "a")
    for content in "bcd":
        replace(store, "support", content)
    create(store, "twin", "b")
    replace(store, "support", "e")

    assert content_of(store, store.current("twin")) == "b"


def test_details_are_kept_until_the_name_is_deleted(
    store: AdapterStore, open_store: OpenStore
) -> None:
    create(store, "support", "a")
    said = Details(description="German", tags=("de", "it"), pinned=True, enabled=False)
    store.describe("support", said)
    replace(store, "support", "b")
    with reopened(store, open_store) as again:
        assert again.details("support") == said
        again.delete("support")
        create(again, "support", "a")
        assert again.details("support") == Details()


def test_equal_details_are_no_change(store: AdapterStore, folder: Path) -> None:
    create(store, "support", "a")
    before = list(folder.rglob("*.jsonl"))
    sizes = [path.stat().st_size for path in before]
    store.describe("support", Details())

    assert list(folder.rglob("*.jsonl")) == before
    assert [path.stat().st_size for path in before] == sizes


def test_ten_thousand_adapters_are_one_journal(folder: Path) -> None:
    store = AdapterStore(folder)
    create(store, "first", "a")
    line = (folder / "journal.jsonl").read_text()
    store.close()
    lines = [line.replace('"first"', f'"a{number:05}"') for number in range(10_000)]
    (folder / "journal.jsonl").write_text("".join(lines))
    store = AdapterStore(folder)

    assert len(store) == 10_000
    assert store.names("a04999", 2) == ["a05000", "a05001"]
    create(store, "one-more", "b")
    store.delete("a00000")
    assert len(store) == 10_000
    store.close()
