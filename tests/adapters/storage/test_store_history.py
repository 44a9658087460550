"""Revisions of a name are listed, rolled back to, and dropped; operators set its details."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infuse.adapters.errors import RevisionConflict, UnknownAdapter, UnknownRevision
from infuse.adapters.storage.revision import Details, DetailsChange, Origin
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore
from tests.adapters.storage.store_contents import content_of, create, reopened, replace, write


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
    """A client that has read the ETag before two changes must not overwrite them."""
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
    change = DetailsChange(description="German", tags=("de", "it"), pinned=True, enabled=False)
    store.describe("support", change)
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
    store.describe("support", DetailsChange())

    assert list(folder.rglob("*.jsonl")) == before
    assert [path.stat().st_size for path in before] == sizes


def test_a_change_of_details_is_another_etag_also_after_opening_again(
    store: AdapterStore, open_store: OpenStore
) -> None:
    first = create(store, "support", "a").etag
    second = store.describe("support", DetailsChange(description="x"))[0].etag
    third = store.describe("support", DetailsChange(description=""))[0].etag
    same = store.describe("support", DetailsChange(description=""), if_match=third)[0].etag

    assert len({first, second, third}) == 3
    assert same == third == store.current("support").etag
    with reopened(store, open_store) as again:
        assert again.current("support").etag == third


def test_what_was_seen_before_a_change_of_details_changes_nothing(store: AdapterStore) -> None:
    seen = create(store, "support", "a").etag
    store.describe("support", DetailsChange(tags=("de",)))
    for change in (
        lambda: store.describe("support", DetailsChange(enabled=False), if_match=seen),
        lambda: replace(store, "support", "b", if_match=seen),
        lambda: replace(store, "support", "a", if_match=seen),
        lambda: store.roll_back("support", 1, if_match=seen),
        lambda: store.delete("support", if_match=seen),
    ):
        with pytest.raises(RevisionConflict) as conflict:
            change()
        assert conflict.value.current == store.current("support").etag
    assert store.details("support") == Details(tags=("de",))
    new, _ = replace(store, "support", "b", if_match=store.current("support").etag)
    assert new.etag == store.current("support").etag


def test_changes_at_once_are_all_made(store: AdapterStore) -> None:
    create(store, "support", "a")
    changes = [
        DetailsChange(description="German"),
        DetailsChange(tags=("de",)),
        DetailsChange(pinned=True),
        DetailsChange(enabled=False),
    ]
    for _ in range(10):
        together = threading.Barrier(len(changes))

        def make(change: DetailsChange, together: threading.Barrier = together) -> None:
            together.wait()
            store.describe("support", change)

        with ThreadPoolExecutor(len(changes)) as threads:
            list(threads.map(make, changes))
        said = Details(description="German", tags=("de",), pinned=True, enabled=False)
        assert store.details("support") == said
        reset = DetailsChange(description="", tags=(), pinned=False, enabled=True)
        store.describe("support", reset)


def test_a_deleted_name_is_told_from_one_that_never_was(
    store: AdapterStore, open_store: OpenStore
) -> None:
    create(store, "support", "a")
    store.delete("support")
    with reopened(store, open_store) as again:
        assert again.was_deleted("support")
        assert not again.was_deleted("nobody")
        create(again, "support", "a")
        assert not again.was_deleted("support")


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


def test_revisions_that_were_replaced_long_ago_are_dropped_and_current_ones_stay(
    store: AdapterStore, folder: Path, open_store: OpenStore
) -> None:
    for name in ("support", "single"):
        create(store, name, name)
    replace(store, "support", "b")
    replace(store, "support", "c")
    moment = store.current("support").created

    assert store.drop_replaced_before(moment) == 1
    assert store.drop_replaced_before(moment) == 0
    assert (numbers(store), numbers(store, "single")) == ([3, 2], [1])
    assert store.drop_replaced_before(moment + timedelta(days=1)) == 1
    assert len(list((folder / "content").iterdir())) == 2
    with reopened(store, open_store) as again:
        assert (numbers(again), numbers(again, "single")) == ([3], [1])
        assert content_of(again, again.current("support")) == "c"
        replace(again, "support", "a")
        assert numbers(again) == [4, 3]


def test_old_revisions_are_dropped_a_few_names_at_a_time(store: AdapterStore) -> None:
    for name in ("a", "b", "c"):
        create(store, name, "x")
        replace(store, name, "y")
    later = datetime.now(UTC)

    assert [store.drop_replaced_before(later, 2) for _ in range(3)] == [2, 1, 0]
