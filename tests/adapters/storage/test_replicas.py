"""Several servers on one store: what one acknowledges holds on all."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from obstore.store import LocalStore

from infuse.adapters.errors import (
    AdapterError,
    AdapterExists,
    RevisionConflict,
    RevisionDamaged,
    StoreLocked,
    StoreUnreachable,
    UnknownAdapter,
)
from infuse.adapters.storage.bucket_journal import COMPACT_EVERY
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import open_bucket
from tests.adapters.storage.replicas import (
    SHORT,
    STORAGES,
    CutOff,
    bucket_in,
    replica,
    shared_bucket,
    shared_folder,
)
from tests.adapters.storage.store_contents import content_of, create, replace, write

REPOSITORY = Path(__file__).parents[3]
Open = Callable[..., AdapterStore]


@pytest.fixture(params=STORAGES)
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stores(storage: str, folder: Path) -> Iterator[list[AdapterStore]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(replica(storage, folder, 3))) for _ in range(3)]


CHANGES: list[tuple[Callable[[AdapterStore], object], tuple[int, str] | None]] = [
    (lambda store: create(store, "support", "a"), (1, "a")),
    (lambda store: replace(store, "support", "b"), (2, "b")),
    (lambda store: store.roll_back("support", 1), (3, "a")),
    (lambda store: store.delete("support"), None),
    (lambda store: create(store, "support", "c"), (4, "c")),
]


def test_every_acknowledged_change_holds_on_every_server(stores: list[AdapterStore]) -> None:
    for turn, (change, expected) in enumerate(CHANGES):
        change(stores[turn % 3])
        for store in stores:
            if expected is None:
                with pytest.raises(UnknownAdapter):
                    store.current("support")
                assert store.names() == []
                assert store.was_deleted("support")
            else:
                revision = store.current("support")
                assert (revision.number, content_of(store, revision)) == expected


def test_details_and_etags_hold_on_every_server(stores: list[AdapterStore]) -> None:
    seen = create(stores[0], "support", "a").etag
    change = DetailsChange(enabled=False, pinned=True, tags=("de",))
    etag = stores[1].describe("support", change, if_match=seen)[0].etag
    assert {store.current("support").etag for store in stores} == {etag}
    assert {store.details("support").tags for store in stores} == {("de",)}
    for store in stores:
        with pytest.raises(RevisionConflict):
            replace(store, "support", "b", if_match=seen)
    replace(stores[2], "support", "b", if_match=etag)


def test_a_name_that_another_server_has_created_is_taken(stores: list[AdapterStore]) -> None:
    create(stores[0], "support", "a")
    with pytest.raises(AdapterExists):
        create(stores[1], "support", "b")
    assert content_of(stores[2], stores[2].current("support")) == "a"


def at_once(changes: list[Callable[[], object]]) -> list[object]:
    """Make changes that begin together; return their results or errors."""
    together = threading.Barrier(len(changes))

    def make(change: Callable[[], object]) -> object:
        together.wait()
        try:
            return change()
        except AdapterError as error:
            return error

    with ThreadPoolExecutor(len(changes)) as threads:
        return list(threads.map(make, changes))


def test_of_changes_at_once_with_one_etag_one_is_made(stores: list[AdapterStore]) -> None:
    create(stores[0], "support", "a")
    for number in range(5):
        etag = stores[0].current("support").etag
        changes = [DetailsChange(description=f"{number}{letter}") for letter in "abc"]
        results = at_once(
            [
                partial(store.describe, "support", change, if_match=etag)
                for store, change in zip(stores, changes, strict=True)
            ]
        )
        [made] = [result for result in results if isinstance(result, tuple)]
        assert sum(isinstance(result, RevisionConflict) for result in results) == 2
        assert [store.details("support") for store in stores] == [made[1]] * 3


def test_uploads_at_once_get_numbers_of_their_own_and_none_is_lost(
    stores: list[AdapterStore],
) -> None:
    create(stores[0], "support", "z")
    numbers = {1}
    for number in range(5):
        contents = [f"{number}{letter}" for letter in "abc"]
        results = at_once(
            [
                partial(replace, store, "support", content)
                for store, content in zip(stores, contents, strict=True)
            ]
        )
        given = {revision.number for revision, _ in results}  # type: ignore[misc]
        assert len(given) == 3
        assert not given & numbers
        numbers |= given
        shown = [[(r.number, content_of(s, r)) for r in s.revisions("support")] for s in stores]
        assert shown[0] == shown[1] == shown[2]
        assert {content for _, content in shown[0]} == set(contents)
    assert numbers == set(range(1, 17))


def test_one_content_under_many_names_stays_until_the_last_has_gone(
    stores: list[AdapterStore],
) -> None:
    """Each server deletes its name while another one uploads the same content again."""
    for number in range(10):
        changes: list[Callable[[], object]] = [
            partial(create, stores[0], f"x{number}", "a"),
            partial(create, stores[1], f"y{number}", "a"),
        ]
        if number:
            changes += [
                partial(stores[2].delete, f"x{number - 1}"),
                partial(stores[0].delete, f"y{number - 1}"),
            ]
        results = at_once(changes)
        assert not [each for each in results if isinstance(each, AdapterError)]
        for store in stores:
            assert store.names() == [f"x{number}", f"y{number}"]
            for name in store.names():
                assert content_of(store, store.current(name)) == "a"


def test_a_server_that_starts_reads_everything_and_is_waited_for(
    stores: list[AdapterStore], storage: str, folder: Path
) -> None:
    create(stores[0], "support", "a")
    with closing(replica(storage, folder)) as late:
        assert content_of(late, late.current("support")) == "a"
        replace(stores[1], "support", "b")
        assert content_of(late, late.current("support")) == "b"
        replace(late, "support", "c")
    for store in stores:
        assert content_of(store, store.current("support")) == "c"


def test_what_is_mended_on_one_server_is_served_by_all(
    stores: list[AdapterStore], folder: Path
) -> None:
    revision = create(stores[0], "support", "a")
    for path in folder.parent.rglob("weights"):
        path.write_bytes(b"!")
    for store in stores:
        with pytest.raises(RevisionDamaged):
            store.read(revision, ())
    replace(stores[1], "support", "a")
    for store in stores:
        assert store.read(revision, ["weights"]) == {"weights": b"a" * 100}


class Interrupted(CutOff):
    """A bucket in which something happens before the event of a content that was just uploaded, or
    compared with the one that is there."""

    meanwhile: Callable[[], object] | None = None

    def put_all(self, files: Mapping[str, Path]) -> None:
        super().put_all(files)
        self._interrupt()

    def fetch_all(self, files: Mapping[str, Path]) -> None:
        super().fetch_all(files)
        self._interrupt()

    def _interrupt(self) -> None:
        if self.meanwhile is not None:
            happens, self.meanwhile = self.meanwhile, None
            happens()


def interrupted(folder: Path) -> Interrupted:
    return Interrupted(LocalStore(folder, automatic_cleanup=True, mkdir=True), "file://")


def test_a_server_that_starts_in_the_midst_of_an_upload_takes_nothing_from_it(folder: Path) -> None:
    """It removes what crashes have left, which the upload looks like."""
    objects = interrupted(folder)
    with closing(AdapterStore(shared_bucket(folder, objects))) as store:
        objects.meanwhile = lambda: AdapterStore(shared_bucket(folder)).close()
        create(store, "support", "a")
        with closing(AdapterStore(shared_bucket(folder))) as other:
            assert content_of(other, other.current("support")) == "a"
    assert len(list(folder.glob("content/*/*"))) == 1


def test_a_content_that_another_server_removes_in_the_midst_of_its_upload_is_there_afterwards(
    folder: Path,
) -> None:
    objects = interrupted(folder)
    with (
        closing(AdapterStore(shared_bucket(folder, objects))) as store,
        closing(AdapterStore(shared_bucket(folder))) as other,
    ):
        create(other, "twin", "a")
        objects.meanwhile = lambda: other.delete("twin")
        create(store, "support", "a")
        assert other.names() == ["support"]
        for each in (store, other):
            assert content_of(each, each.current("support")) == "a"


# Who is away


def test_a_server_that_cannot_reach_the_bucket_answers_no_more_until_it_can(folder: Path) -> None:
    objects = bucket_in(folder)
    with (
        closing(AdapterStore(shared_bucket(folder))) as store,
        closing(AdapterStore(shared_bucket(folder, objects, SHORT))) as away,
    ):
        create(store, "support", "a")
        objects.is_away = True
        replace(store, "support", "b")
        for ask in (
            lambda: away.current("support"),
            lambda: away.revision("support", 1),
            lambda: away.revisions("support"),
            lambda: away.details("support"),
            lambda: away.names(),
            lambda: "support" in away,
            lambda: away.was_deleted("support"),
            lambda: away.check(),
        ):
            with pytest.raises(StoreUnreachable, match=r"has not reached file://.* ask another"):
                ask()
        with pytest.raises(StoreUnreachable):
            away.delete("support")
        assert len(away) == 1
        objects.is_away = False
        assert content_of(away, wait_until_current(away).current("support")) == "b"
        away.delete("support")
        assert store.names() == []


class Held(CutOff):
    """A bucket that answers nothing for a while."""

    def __init__(self, folder: Path) -> None:
        super().__init__(LocalStore(folder, mkdir=True), f"file://{folder}")
        self.goes_on = threading.Event()
        self.goes_on.set()

    def _reach(self) -> None:
        self.goes_on.wait()
        super()._reach()


def test_a_server_is_behind_until_it_has_read_on_or_failed_to(folder: Path) -> None:
    objects = Held(folder)
    with closing(AdapterStore(shared_bucket(folder, objects, SHORT))) as store:
        assert not store.is_behind
        objects.goes_on.clear()
        wait_until(lambda: store.is_behind)
        with pytest.raises(StoreUnreachable):
            store.check()
        objects.goes_on.set()
        wait_until(lambda: not store.is_behind)
        store.check()
        objects.is_away = True
        wait_until(lambda: store.is_behind or not is_current(store))
        wait_until(lambda: not store.is_behind)
        assert not is_current(store)


def is_current(store: AdapterStore) -> bool:
    try:
        store.check()
    except StoreUnreachable:
        return False
    return True


def wait_until(happens: Callable[[], bool]) -> None:
    while not happens():
        time.sleep(0.001)


def wait_until_current(store: AdapterStore) -> AdapterStore:
    wait_until(lambda: is_current(store))
    return store


def test_a_shared_folder_that_was_removed_is_not_made_again(folder: Path) -> None:
    with closing(AdapterStore(shared_folder(folder, SHORT))) as store:
        create(store, "support", "a")
        folder.rename(folder.with_name("elsewhere"))
        with pytest.raises(StoreUnreachable, match="was removed, moved or replaced"):
            store.check()
        wait_until_away(store)
        assert not folder.exists()
        folder.with_name("elsewhere").rename(folder)
        replace(wait_until_current(store), "support", "b")
        assert content_of(store, store.current("support")) == "b"


def wait_until_away(store: AdapterStore) -> None:
    while True:
        try:
            store.names()
        except StoreUnreachable:
            return
        time.sleep(0.01)


def test_a_dead_server_is_waited_for_once(folder: Path) -> None:
    objects = bucket_in(folder)
    with (
        closing(AdapterStore(shared_bucket(folder))) as store,
        closing(AdapterStore(shared_bucket(folder, objects, SHORT))),
    ):
        objects.is_away = True
        shown = list(folder.glob("replicas/*"))
        create(store, "support", "a")
        assert len(list(folder.glob("replicas/*"))) == len(shown) - 1 == 1


def test_a_server_that_stops_is_not_waited_for(storage: str, folder: Path) -> None:
    with closing(replica(storage, folder)) as store:
        replica(storage, folder).close()
        assert len(list(folder.glob("replicas/*"))) == 1
        create(store, "support", "a")


def test_a_long_history_is_compacted_and_every_server_follows(folder: Path) -> None:
    with closing(open_bucket(folder)) as alone:
        create(alone, "support", "a")
        for number in range(COMPACT_EVERY - 10):
            alone.describe("support", DetailsChange(description=str(number)))
    with (
        closing(AdapterStore(shared_bucket(folder))) as store,
        closing(AdapterStore(shared_bucket(folder))) as other,
    ):
        for letter in "abcdefghijkl":
            (store if letter < "f" else other).describe("support", DetailsChange(tags=(letter,)))
            assert store.details("support").tags == other.details("support").tags == (letter,)
    assert len(list(folder.glob("journal/*"))) < COMPACT_EVERY / 2
    with closing(open_bucket(folder)) as alone:
        assert alone.details("support").tags == ("l",)


def test_old_revisions_that_one_server_drops_are_gone_on_all(stores: list[AdapterStore]) -> None:
    create(stores[0], "support", "a")
    replace(stores[1], "support", "b")
    assert stores[2].drop_replaced_before(datetime.now(UTC)) == 1
    for store in stores:
        assert [each.number for each in store.revisions("support")] == [2]
        assert content_of(store, store.current("support")) == "b"


@pytest.mark.fault(
    "process",
    "A server is killed within an upload to a shared store",
    by="SIGKILL",
    promise="The next start removes what it left, and nothing of other servers' uploads.",
)
def test_what_a_killed_server_was_staging_is_removed_by_the_next_one_and_no_other_staging(
    folder: Path,
) -> None:
    code = "import sys; from pathlib import Path;"
    code += "from infuse.adapters.storage.store import AdapterStore;"
    code += "from tests.adapters.storage.replicas import SHORT, shared_folder;"
    code += "staging = AdapterStore(shared_folder(Path(sys.argv[1]), SHORT)).staging();"
    code += "(staging.__enter__() / 'weights').touch();"
    code += "print('staged', flush=True); sys.stdin.read()"
    with closing(replica("a folder", folder)) as store, store.staging() as staged:
        killed = subprocess.Popen(
            [sys.executable, "-c", code, folder],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"staged\n"
        killed.kill()
        killed.communicate()
        assert len(list(folder.rglob("staging/*/*/weights"))) == 1
        with closing(replica("a folder", folder)) as other:
            assert list(folder.rglob("staging/*/*/weights")) == []
            write(staged, "a")
            store.create("support", staged)
            assert content_of(other, other.current("support")) == "a"
    assert list(folder.glob("staging/*")) == []


# Servers that do not share

ALONE: dict[str, Open] = {"a folder": AdapterStore, "a bucket": open_bucket}


def test_a_server_that_does_not_share_finds_what_others_have_shared_and_the_other_way_round(
    storage: str, folder: Path
) -> None:
    with closing(ALONE[storage](folder)) as alone:
        create(alone, "support", "a")
    with closing(replica(storage, folder)) as one, closing(replica(storage, folder)) as two:
        assert content_of(one, one.current("support")) == "a"
        replace(two, "support", "b")
    with closing(ALONE[storage](folder)) as alone:
        assert content_of(alone, alone.current("support")) == "b"
        assert alone.current("support").number == 2


def test_a_server_that_does_not_share_is_refused_while_others_do(
    storage: str, folder: Path
) -> None:
    with closing(replica(storage, folder)):
        with pytest.raises(StoreLocked, match="another server"):
            ALONE[storage](folder)
        with closing(replica(storage, folder)) as store:
            create(store, "support", "a")


def test_servers_that_share_are_refused_while_one_does_not(storage: str, folder: Path) -> None:
    with closing(ALONE[storage](folder)), pytest.raises(StoreLocked, match="another server"):
        replica(storage, folder)
