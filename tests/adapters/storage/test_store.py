"""Names, revisions and their files, on disk and in a bucket."""

import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from infuse.adapters.errors import (
    AdapterExists,
    InvalidAdapter,
    RevisionConflict,
    StoreLocked,
    UnknownAdapter,
    UnknownRevision,
)
from infuse.adapters.storage.revision import Origin
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import OpenStore
from tests.adapters.storage.store_contents import content_of, create, reopened, replace

# Revisions


def test_a_new_name_has_revision_1(store: AdapterStore) -> None:
    before = datetime.now(UTC)
    revision = create(store, "support", "a")
    assert (revision.name, revision.number, revision.origin) == ("support", 1, Origin())
    assert before <= revision.created <= datetime.now(UTC) + timedelta(seconds=1)
    assert revision.size == len("config of a") + 100
    assert store.current("support") == revision
    assert content_of(store, revision) == "a"


def test_a_taken_name_is_refused_and_stays_as_it_is(store: AdapterStore) -> None:
    create(store, "support", "a")
    with pytest.raises(AdapterExists, match="support"):
        create(store, "support", "b")
    assert content_of(store, store.current("support")) == "a"


def test_a_replacement_is_the_next_revision_and_the_old_one_stays_readable(
    store: AdapterStore,
) -> None:
    old = create(store, "support", "a")
    new, changed = replace(store, "support", "b")
    assert (new.number, changed) == (2, True)
    assert store.current("support") == new
    assert store.revision("support", 1) == old
    assert content_of(store, old) == "a"


def test_a_replacement_with_the_same_content_changes_nothing(store: AdapterStore) -> None:
    create(store, "support", "a")
    two, _ = replace(store, "support", "b")
    assert replace(store, "support", "b") == (two, False)
    assert store.current("support") == two


def test_content_of_an_older_revision_makes_a_new_one(store: AdapterStore) -> None:
    one = create(store, "support", "a")
    replace(store, "support", "b")
    three, changed = replace(store, "support", "a")
    assert (three.number, changed, three.digest) == (3, True, one.digest)


def test_a_deleted_name_is_gone_and_so_are_its_files(store: AdapterStore) -> None:
    one = create(store, "support", "a")
    store.delete("support")
    assert "support" not in store
    assert not store.files(one).exists()
    for use in (store.current, store.delete, lambda name: replace(store, name, "a")):
        with pytest.raises(UnknownAdapter, match="support"):
            use("support")


def test_numbers_go_on_after_a_name_was_deleted(store: AdapterStore, open_store: OpenStore) -> None:
    create(store, "support", "a")
    replace(store, "support", "b")
    store.delete("support")
    assert create(store, "support", "c").number == 3
    with pytest.raises(UnknownRevision, match="no revision 1"):
        store.revision("support", 1)
    store.delete("support")
    with reopened(store, open_store) as again:
        assert create(again, "support", "d").number == 4


def test_an_unknown_revision_is_told_from_an_unknown_name(store: AdapterStore) -> None:
    create(store, "support")
    for number in (0, 2, -1):
        with pytest.raises(UnknownRevision):
            store.revision("support", number)
    with pytest.raises(UnknownAdapter):
        store.revision("nobody", 1)


def test_names_with_equal_content_share_it_and_each_keeps_it(store: AdapterStore) -> None:
    one, two = create(store, "one", "a"), create(store, "two", "a")
    assert store.files(one) == store.files(two)
    store.delete("one")
    assert content_of(store, two) == "a"
    store.delete("two")
    assert not store.files(two).exists()


def test_everything_is_there_after_opening_again(
    store: AdapterStore, open_store: OpenStore
) -> None:
    create(store, "one", "a")
    replace(store, "one", "b")
    create(store, "two", "c")
    create(store, "three", "d")
    store.delete("three")
    before = {name: store.current(name) for name in store.names()}
    with reopened(store, open_store) as again:
        assert {name: again.current(name) for name in again.names()} == before
        assert content_of(again, again.revision("one", 1)) == "a"
        assert content_of(again, again.current("two")) == "c"


@pytest.mark.parametrize(
    "name",
    ["a", "A.b-c_9", "0", "x" * 128, "my-org/support.de", "files/x", "x" * 96 + "/" + "x" * 128],
)
def test_a_good_name_is_taken(store: AdapterStore, name: str) -> None:
    assert create(store, name).name == name


@pytest.mark.parametrize(
    "name",
    [
        *["", ".", "..", ".a", "-a", "a b", "a\n", "ä", "a@1", "x" * 129, "\0", "x" * 97 + "/a"],
        *["/a", "a/", "a//b", "a/b/c", "../a", "a/..", "a/../b", "./a", "a/.b", "a/b@1", "a/b\n"],
    ],
)
def test_a_name_that_could_not_be_a_folder_or_a_model_is_refused(
    store: AdapterStore, name: str
) -> None:
    with pytest.raises(InvalidAdapter, match="is no adapter name"):
        create(store, name)
    assert store.names() == []


def test_names_are_sorted_and_come_in_pages(store: AdapterStore) -> None:
    for name in ("c", "a", "B", "d"):
        create(store, name)
    assert store.names() == ["B", "a", "c", "d"]
    assert store.names(limit=2) == ["B", "a"]
    assert store.names(after="a", limit=1) == ["c"]
    assert store.names(after="b") == ["c", "d"]
    assert store.names(after="d") == []
    assert len(store) == 4


@pytest.mark.parametrize("part", ["files", "revisions", "rollback", "vectors"])
def test_a_name_that_is_also_a_part_of_another_adapter_is_refused(
    store: AdapterStore, part: str
) -> None:
    with pytest.raises(InvalidAdapter, match=f"cannot be told from the {part} of an adapter"):
        create(store, f"support/{part}")
    assert create(store, part).name == part


def test_a_name_with_an_owner_is_there_after_opening_again(
    store: AdapterStore, open_store: OpenStore
) -> None:
    one = create(store, "my-org/support", "a")
    create(store, "support", "b")
    with reopened(store, open_store) as again:
        assert again.names() == ["my-org/support", "support"]
        assert content_of(again, again.current("my-org/support")) == "a"
        assert again.current("my-org/support") == one


# ETags


def test_an_etag_is_a_quoted_name_of_the_content(store: AdapterStore) -> None:
    one, two, other = create(store, "1", "a"), create(store, "2", "a"), create(store, "3", "b")
    assert one.etag == two.etag != other.etag
    assert one.etag[0] == one.etag[-1] == '"'
    assert one.etag.count('"') == 2


def test_an_etag_that_is_not_current_is_a_conflict_that_names_the_current_one(
    store: AdapterStore,
) -> None:
    old = create(store, "support", "a")
    new, _ = replace(store, "support", "b", if_match=old.etag)
    for change in (
        lambda: replace(store, "support", "c", if_match=old.etag),
        lambda: store.delete("support", if_match=old.etag),
    ):
        with pytest.raises(RevisionConflict) as conflict:
            change()
        assert conflict.value.current == new.etag
    assert store.current("support") == new


@pytest.mark.parametrize("any_state", [True, False])
def test_the_current_etag_or_a_star_may_change_and_delete(
    store: AdapterStore, any_state: bool
) -> None:
    one = create(store, "support", "a")
    two, _ = replace(store, "support", "b", if_match="*" if any_state else one.etag)
    store.delete("support", if_match="*" if any_state else two.etag)
    assert "support" not in store


# One owner


def test_a_second_process_cannot_open_the_folder(folder: Path) -> None:
    code = (
        "from pathlib import Path; from infuse.adapters.storage.store import AdapterStore; "
        f"AdapterStore(Path({str(folder)!r}))"
    )
    with closing(AdapterStore(folder)) as store:
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert second.returncode != 0
        assert "StoreLocked: another server uses the adapters folder" in second.stderr
        create(store, "still-works")


def test_a_closed_store_lets_the_next_one_open(store: AdapterStore, open_store: OpenStore) -> None:
    with pytest.raises(StoreLocked):
        open_store()
    with reopened(store, open_store):
        pass


def test_of_many_threads_that_create_a_name_one_wins(store: AdapterStore) -> None:
    outcomes: list[str] = []
    together = threading.Barrier(8)

    def compete(content: str) -> None:
        together.wait()
        try:
            create(store, "support", content)
            outcomes.append(content)
        except AdapterExists:
            outcomes.append("")

    threads = [threading.Thread(target=compete, args=(content,)) for content in "abcdefgh"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [winner] = [content for content in outcomes if content]
    assert content_of(store, store.current("support")) == winner
    assert len(outcomes) == 8
