"""A store in a bucket: a working S3 server behind a proxy that sometimes fails."""

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from infuse.adapters.errors import (
    AdapterError,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreUnreachable,
)
from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.bucket_journal import COMPACT_EVERY
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import open_bucket
from tests.adapters.storage.store_contents import content_of, create, replace
from tests.adapters.storage.test_store_failures import CHANGES
from tests.bad_s3 import BadS3, Fault, bad_s3

Open = Callable[..., AdapterStore]


@pytest.fixture
def proxy(s3_server: str) -> Iterator[BadS3]:
    with bad_s3(s3_server) as proxy:
        yield proxy


@pytest.fixture
def open_at(s3: str, proxy: BadS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the bucket with the named cache; another cache stands for another machine."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)

    def open_at(cache: str = "cache", prefix: str = "", **lease: float) -> AdapterStore:
        objects = Objects.at(s3 + prefix, patience=2)
        return AdapterStore(BucketStorage(objects, tmp_path / cache, **lease))

    return open_at


@pytest.fixture
def store(open_at: Open) -> Iterator[AdapterStore]:
    with closing(open_at()) as store:
        yield store


@pytest.fixture
def objects(s3: str) -> Iterator[Objects]:
    with closing(Objects.at(s3)) as objects:
        yield objects


def put(s3: str, key: str, data: bytes) -> None:
    """Write an object as another program would."""
    obstore.put(from_url(s3, client_options={"allow_http": True}), key, data)


# The cache


def test_another_machine_finds_everything(open_at: Open) -> None:
    with closing(open_at("here")) as store:
        create(store, "support", "a")
        revision, _ = replace(store, "support", "b")
    with closing(open_at("there")) as store:
        assert store.current("support") == revision
        assert [content_of(store, each) for each in store.revisions("support")] == ["b", "a"]


def test_what_is_cached_and_every_name_is_there_without_the_bucket(
    store: AdapterStore, proxy: BadS3
) -> None:
    revision = create(store, "support", "a")
    proxy.always("refuses")
    proxy.requests.clear()
    assert store.names() == ["support"]
    assert content_of(store, store.current("support")) == "a"
    assert content_of(store, revision) == "a"
    assert [each for each in proxy.requests if "lease" not in each] == []


@pytest.mark.parametrize("taken", ["", "content", "content/*", "content/*/weights", "staging"])
def test_whatever_is_taken_from_the_cache_is_fetched_again(
    store: AdapterStore, tmp_path: Path, taken: str
) -> None:
    revision = create(store, "support", "a")
    for path in (tmp_path / "cache").glob(taken) if taken else [tmp_path / "cache"]:
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert content_of(store, revision) == "a"
    assert create(store, "other", "b").number == 1


def test_what_is_not_cached_waits_for_the_bucket(open_at: Open, proxy: BadS3) -> None:
    with closing(open_at("here")) as store:
        create(store, "support", "a")
    with closing(open_at("there")) as store:
        proxy.always("refuses")
        with pytest.raises(StoreUnreachable, match="s3://bucket/"):
            store.files(store.current("support"))
        proxy.always(None)
        assert content_of(store, store.current("support")) == "a"


@pytest.mark.fault(
    "bucket",
    "An object of a content is altered or gone",
    by="the bucket",
    promise="It is never served; the error says to upload it again.",
)
@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_a_content_that_was_damaged_in_the_bucket_is_never_served(
    store: AdapterStore, objects: Objects, s3: str, tmp_path: Path, damage: str
) -> None:
    revision = create(store, "support", "a")
    shutil.rmtree(tmp_path / "cache" / "content")
    [weights] = [key for key in objects.list("content") if key.endswith("weights")]
    if damage == "gone":
        objects.delete([weights])
    else:
        put(s3, weights, b"b" * 100)
    with pytest.raises(StoreDamaged, match=r"support@1 in s3://bucket/.* upload the adapter again"):
        store.files(revision)
    replace(store, "support", "c")
    assert content_of(store, store.current("support")) == "c"


@pytest.mark.fault(
    "bucket",
    "An event says that an adapter's files are where other objects are, or nowhere",
    by="the bucket",
    promise="The adapter is told to be damaged; no other object is read or deleted.",
)
@pytest.mark.parametrize("place", ["journal", "", "..", "content", "\\ud800", "content/x/1-1"])
def test_the_files_of_an_adapter_are_looked_for_nowhere_else(
    open_at: Open, s3: str, objects: Objects, place: str
) -> None:
    with closing(open_at()) as store:
        create(store, "other", "b")
        create(store, "support", "a")
    *_, key = objects.list("journal")
    line = objects.get(key) or b""
    changed, count = re.subn(b'"place":"[^"]*"', lambda _: f'"place":"{place}"'.encode(), line)
    assert count == 1
    put(s3, key, changed)
    with closing(open_at("there")) as store:
        if "support" in store:
            with pytest.raises(StoreDamaged):
                content_of(store, store.current("support"))
            store.delete("support")
        assert content_of(store, store.current("other")) == "b"
    with closing(open_at("elsewhere")) as store:
        assert store.names() == ["other"]
        assert content_of(store, store.current("other")) == "b"


def test_contents_that_nobody_can_ask_for_leave_cache_and_bucket(
    store: AdapterStore, objects: Objects, tmp_path: Path
) -> None:
    create(store, "support", "a")
    store.delete("support")
    assert objects.list("content") == []
    assert list((tmp_path / "cache/content").iterdir()) == []


@pytest.mark.fault(
    "bucket",
    "Half an upload is left in the bucket",
    by="the bucket",
    promise="The next server removes it, and nothing of a later one.",
)
def test_what_an_interrupted_upload_left_in_the_bucket_is_removed_by_the_next_server(
    open_at: Open, s3: str, objects: Objects
) -> None:
    with closing(open_at()) as store:
        create(store, "support", "a")
        digest = store.current("support").digest
    put(s3, "content/unfinished/000000000001-7/weights", b"half")
    put(s3, f"content/{digest}/000000000001-7/weights", b"half")
    put(s3, "content/of-a-later-server/000000000009-0/weights", b"half")
    open_at().close()
    with closing(open_at("there")) as store:
        assert content_of(store, store.current("support")) == "a"
    assert {key.split("/")[1] for key in objects.list("content")} == {digest, "of-a-later-server"}
    assert len(objects.list(f"content/{digest}")) == 2


# A bucket that does not work

FAULTS: list[Fault] = ["refuses", "is full", "hangs", "loses the request", "loses the answer"]


def state_of(store: AdapterStore) -> object:
    return {
        name: (store.revisions(name), store.details(name), content_of(store, store.current(name)))
        for name in store.names()
    }


@pytest.mark.fault(
    "bucket",
    "The bucket fails from any request of a change on",
    by="a proxy before the bucket",
    promise="Another machine finds the old state; the new one where the change was acknowledged.",
    case="refuses",
)
@pytest.mark.fault(
    "bucket",
    "Answers are lost from any request of a change on",
    by="a proxy before the bucket",
    promise="This server shows what it has acknowledged, and another machine the old state or "
    "the new one, whole.",
    case="loses the answer",
)
@pytest.mark.parametrize("fault", ["refuses", "loses the answer"])
@pytest.mark.parametrize("change", ["create", "replace", "roll back", "delete"])
def test_a_request_that_fails_at_any_moment_leaves_the_old_state_or_the_new_one(
    open_at: Open, proxy: BadS3, change: str, fault: Fault
) -> None:
    """All requests of a change fail from its first on, then from its second on, and so forth, until
    the change succeeds."""
    for place in range(100):
        prefix = f"/{place}"
        with closing(open_at("here", prefix)) as store:
            create(store, "support", "a")
            replace(store, "support", "b")
            before = state_of(store)
            failed = failing_from(place, fault, proxy)
            try:
                CHANGES[change](store)
                acknowledged = True
            except StoreUnreachable:
                acknowledged = False
                assert state_of(store) == before
            all_was_well = not failed()
            proxy.always(None)
            after = state_of(store)
        with closing(open_at("there", prefix)) as again:
            found = state_of(again)
        if acknowledged:
            assert found == after != before
        elif fault != "loses the answer":
            assert found == before
        if all_was_well:
            break
    assert acknowledged
    assert place > 0


def failing_from(place: int, fault: Fault, proxy: BadS3) -> Callable[[], bool]:
    """Give the bucket a fault from its `place`-th request on, requests for the lease excepted."""
    seen: list[str] = []

    def choose(request: str) -> Fault | None:
        if "/lease" in request or "lease%2F" in request:
            return None
        seen.append(request)
        return fault if len(seen) > place else None

    proxy.fault = choose
    return lambda: len(seen) > place


@pytest.mark.fault(
    "bucket",
    "The bucket refuses requests (403)",
    by="a proxy before the bucket",
    promise="Changes fail and say so; the next ones succeed when it works again.",
    case="refuses",
)
@pytest.mark.fault(
    "bucket",
    "The bucket is full (507)",
    by="a proxy before the bucket",
    promise="Changes say that it is full; the next ones succeed when there is room.",
    case="is full",
)
@pytest.mark.fault(
    "bucket",
    "The bucket hangs",
    by="a proxy before the bucket",
    promise="Changes fail after a time; the next ones succeed when it goes on.",
    case="hangs",
)
@pytest.mark.fault(
    "bucket",
    "Requests are lost on their way to the bucket",
    by="a proxy before the bucket",
    promise="Changes fail and change nothing; the next ones succeed.",
    case="loses the request",
)
@pytest.mark.fault(
    "bucket",
    "Answers of the bucket are lost",
    by="a proxy before the bucket",
    promise="Changes fail, may be made all the same, and are found out by the next ones.",
    case="loses the answer",
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bucket_that_comes_back_is_used_again(
    store: AdapterStore, proxy: BadS3, fault: Fault
) -> None:
    create(store, "support", "a")
    proxy.always(fault)
    with pytest.raises(StoreFull if fault == "is full" else StoreUnreachable):
        store.delete("support")
    with pytest.raises(StoreFull if fault == "is full" else StoreUnreachable):
        create(store, "other", "b")
    proxy.always(None)
    proxy.woken.set()
    if fault == "loses the answer":
        # The first attempt was made, as the next change finds out.
        with pytest.raises(AdapterError, match="no adapter named 'support'"):
            store.delete("support")
    else:
        assert store.names() == ["support"]
        store.delete("support")
    assert create(store, "other", "b").number == 1


@pytest.mark.fault(
    "bucket",
    "The bucket carries out every request twice",
    by="a proxy before the bucket",
    promise="Each change is made once.",
    case="does it twice",
)
@pytest.mark.fault(
    "bucket",
    "Requests at once are carried out in another order",
    by="a proxy before the bucket",
    promise="Each change is made once.",
    case="reorders",
)
@pytest.mark.parametrize("fault", ["does it twice", "reorders"])
@pytest.mark.parametrize("change", CHANGES)
def test_requests_that_are_done_twice_or_in_another_order_make_the_change_once(
    open_at: Open, proxy: BadS3, change: str, fault: Fault
) -> None:
    with closing(open_at("here")) as store:
        create(store, "support", "a")
        replace(store, "support", "b")
        create(store, "deleted", "d")
        store.delete("deleted")
        before = state_of(store)
        proxy.always(fault)
        CHANGES[change](store)
        after = state_of(store)
        proxy.always(None)
    with closing(open_at("there")) as again:
        assert state_of(again) == after != before


@pytest.mark.fault(
    "bucket",
    "Requests that were given up are carried out later, after other changes",
    by="a proxy before the bucket, from any request of a change on",
    promise="They change nothing that was acknowledged.",
)
@pytest.mark.parametrize("change", ["create", "replace", "delete"])
def test_a_request_that_is_done_after_it_was_given_up_takes_nothing_that_was_acknowledged(
    open_at: Open, proxy: BadS3, change: str
) -> None:
    """All requests of a change are late from its first on, then from its second on, and so forth;
    they are done when other changes have been made."""
    for place in range(100):
        prefix = f"/{place}"
        with closing(open_at("here", prefix)) as store:
            create(store, "support", "a")
            failed = failing_from(place, "does it later", proxy)
            with suppress(StoreUnreachable):
                CHANGES[change](store)
            all_was_well = not failed()
            proxy.always(None)
            create(store, "later", "c")
            if "support" in store:
                store.delete("support")
            acknowledged = state_of(store)
            proxy.do_what_is_late()
            assert state_of(store) == acknowledged
        with closing(open_at("there", prefix)) as again:
            assert state_of(again) == acknowledged
        if all_was_well:
            break
    assert place > 0


@pytest.mark.fault(
    "bucket",
    "The bucket answers with an earlier answer",
    by="a proxy before the bucket",
    promise="What is not the stored content is never served; the right one is, when the bucket "
    "answers right.",
    case="repeats",
)
@pytest.mark.fault(
    "bucket",
    "The bucket's answers are cut",
    by="a proxy before the bucket",
    promise="As where it answers with an earlier one.",
    case="cuts",
)
@pytest.mark.parametrize("fault", ["repeats the answer before", "cuts the answer"])
def test_files_that_a_bucket_answers_wrong_are_never_taken_for_those_that_were_stored(
    open_at: Open, proxy: BadS3, fault: Fault
) -> None:
    with closing(open_at("here")) as store:
        create(store, "one", "a")
        create(store, "other", "b")
    with closing(open_at("there")) as store:
        assert content_of(store, store.current("one")) == "a"
        proxy.fault = lambda request: fault if request.startswith("GET /bucket/") else None
        with pytest.raises((StoreDamaged, StoreUnreachable)):
            store.files(store.current("other"))
        proxy.always(None)
        assert content_of(store, store.current("other")) == "b"


@pytest.mark.fault(
    "bucket",
    "The bucket hangs within a change",
    by="a proxy before the bucket",
    promise="Names and cached contents are read meanwhile.",
)
def test_names_are_read_while_a_change_hangs(
    s3: str, store: AdapterStore, proxy: BadS3, tmp_path: Path
) -> None:
    store.close()
    patient = AdapterStore(BucketStorage(Objects.at(s3, patience=60), tmp_path / "patient"))
    create(patient, "support", "a")
    arrived = threading.Event()

    def hang(request: str) -> Fault | None:
        if "journal" not in request:
            return None
        arrived.set()
        return "hangs"

    proxy.fault = hang
    with ThreadPoolExecutor() as pool, closing(patient):
        change = pool.submit(patient.delete, "support")
        arrived.wait(60)
        assert patient.names() == ["support"]
        assert content_of(patient, patient.current("support")) == "a"
        assert not change.done()
        proxy.woken.set()
        assert isinstance(change.exception(60), StoreUnreachable)


@pytest.mark.fault(
    "bucket",
    "The bucket does not work when a server starts",
    by="a proxy before the bucket",
    promise="The start fails and says so; the next one succeeds.",
)
@pytest.mark.parametrize("fault", ["refuses", "hangs", "loses the request"])
def test_a_bucket_that_does_not_work_is_told_at_start(
    open_at: Open, proxy: BadS3, fault: Fault
) -> None:
    proxy.always(fault)
    with pytest.raises(StoreUnreachable, match=r"The bucket s3://bucket/.* cannot be used"):
        open_at()
    proxy.always(None)
    proxy.woken.set()
    open_at().close()


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_is_not_there_is_told_at_start(tmp_path: Path) -> None:
    for url in ("s3://not-there/x", "az://nobody"):
        with pytest.raises(StoreUnreachable, match=f"The bucket {url} cannot be used"):
            BucketStorage(Objects.at(url), tmp_path / "cache")


# One owner


def test_a_second_server_does_not_start_while_the_first_one_lives(
    store: AdapterStore, open_at: Open
) -> None:
    store.close()
    with closing(open_at("here", renew_every=0.05)) as store:
        with pytest.raises(StoreLocked, match=r"another server, .*, uses s3://bucket/"):
            open_at("there", renew_every=0.05)
        create(store, "support", "a")


def test_closing_a_store_again_takes_nothing_from_the_next_owner(
    open_at: Open, objects: Objects
) -> None:
    first = open_at("here")
    first.close()
    with closing(open_at("there")):
        lease = objects.list("lease")
        first.close()
        assert objects.list("lease") == lease != []


def test_a_server_that_stopped_is_followed_at_once_and_a_dead_one_after_its_lease(
    open_at: Open,
) -> None:
    open_at("here", lease_seconds=1000).close()
    with closing(open_at("there", lease_seconds=0.2, renew_every=1000)) as dead:
        create(dead, "support", "a")
        with closing(open_at("here")) as store:
            assert store.names() == ["support"]


@pytest.mark.fault(
    "bucket",
    "A server has lost its bucket to another one without noticing",
    by="a lease that runs out",
    promise="It changes nothing any more.",
)
def test_a_server_that_was_taken_over_changes_nothing_any_more(open_at: Open) -> None:
    with closing(open_at("there", lease_seconds=0.2, renew_every=1000)) as old:
        create(old, "support", "a")
        create(old, "twin", "a")
        with closing(open_at("here")) as new:
            new.delete("support")
            create(new, "other", "b")
            for change in CHANGES_OF_THE_OLD:
                with pytest.raises(StoreLocked, match="another server has taken over"):
                    change(old)
            assert content_of(new, new.current("twin")) == "a"
            assert new.names() == ["other", "twin"]
    with closing(open_at("elsewhere")) as third:
        assert content_of(third, third.current("twin")) == "a"
        assert third.names() == ["other", "twin"]


CHANGES_OF_THE_OLD: list[Callable[[AdapterStore], object]] = [
    lambda old: create(old, "late", "b"),
    lambda old: replace(old, "support", "c"),
    lambda old: old.delete("twin"),
]


# Many adapters


def test_ten_thousand_adapters_are_read_with_a_handful_of_requests(
    open_at: Open, proxy: BadS3, s3: str, objects: Objects
) -> None:
    with closing(open_at()) as store:
        create(store, "first", "a")
    line = objects.get("journal/000000000002.jsonl") or b""
    lines = [line.replace(b'"first"', f'"a{number:05}"'.encode()) for number in range(10_000)]
    put(s3, "journal/000000000003-000000010002.jsonl", b"\n".join([*lines, b""]))
    proxy.requests.clear()
    with closing(open_at("there")) as store:
        assert len(store) == 10_001
        assert len([each for each in proxy.requests if "journal" in each]) < 8
        assert content_of(store, store.current("a05000")) == "a"


def test_a_long_history_becomes_a_few_objects(folder: Path) -> None:
    with closing(open_bucket(folder)) as store:
        create(store, "support", "a")
        for number in range(300):
            store.delete("support") if number % 2 == 0 else create(store, "support", "a")
    assert len(list(folder.glob("journal/*"))) < COMPACT_EVERY
    with closing(open_bucket(folder)) as store:
        assert store.current("support").number == 151
