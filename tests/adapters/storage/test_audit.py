"""The audit trail: every change is chained to those before it, and an edit is noticed."""

import json
import random
import tempfile
from collections.abc import Callable
from contextlib import closing
from itertools import count
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from infuse.adapters.storage.audit import audit
from infuse.adapters.storage.backup import back_up, restore
from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.bucket_journal import COMPACT_EVERY
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.storage import Storage
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.storage.replicas import shared_folder, shared_objects
from tests.adapters.storage.store_contents import create, replace

Open = Callable[[], AdapterStore]


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, folder: Path) -> Path | str:
    return folder if request.param == "folder" else str(request.getfixturevalue("s3"))


@pytest.fixture(params=["alone", "shared"])
def open_server(request: pytest.FixtureRequest, place: Path | str, tmp_path: Path) -> Open:
    """Opens a server of its own on the place, with others if they share it."""
    numbers = count()

    def alone() -> AdapterStore:
        if isinstance(place, Path):
            return AdapterStore(place)
        return AdapterStore(BucketStorage(Objects.at(place), tmp_path / "cache"))

    def shared() -> AdapterStore:
        if isinstance(place, Path):
            return AdapterStore(shared_folder(place))
        cache = tmp_path / f"cache{next(numbers)}"
        return AdapterStore(shared_objects(Objects.at(place), cache))

    return alone if request.param == "alone" else shared


def change(store: AdapterStore, number: int) -> None:
    name = f"a{number % 3}"
    if name not in store:
        create(store, name, f"{number}")
    elif number % 4 == 0:
        store.describe(name, DetailsChange(description=f"{number}"), by="ci")
    elif number % 7 == 0:
        store.delete(name, by="ops")
    else:
        replace(store, name, f"{number}")


def test_what_servers_write_is_chained_over_restarts(place: Path | str, open_server: Open) -> None:
    for start in range(3):
        with closing(open_server()) as store:
            for number in range(8):
                change(store, 8 * start + number)
        found = audit(place)
        assert (found.faults, found.unchained) == ([], 0)
    assert len([each for each in found.entries if each.event and "name" in each.event]) == 24


def test_what_two_servers_write_by_turns_is_one_chain(
    folder: Path, s3: str, tmp_path: Path
) -> None:
    def in_bucket(number: int) -> Storage:
        return shared_objects(Objects.at(s3), tmp_path / f"cache{number}")

    shared = {folder: lambda _: shared_folder(folder), s3: in_bucket}
    for place, opened in shared.items():
        with closing(AdapterStore(opened(0))) as one, closing(AdapterStore(opened(1))) as two:
            for number in range(20):
                change((one, two)[number % 2], number)
        assert audit(place).faults == []


def test_a_segment_of_many_events_keeps_the_chain(s3: str, tmp_path: Path) -> None:
    def opened() -> AdapterStore:
        return AdapterStore(BucketStorage(Objects.at(s3), tmp_path / "cache"))

    with closing(opened()) as store:
        create(store, "support", "a")
        for number in range(COMPACT_EVERY):
            store.describe("support", DetailsChange(description=f"{number}"))
    with closing(opened()) as store:
        replace(store, "support", "b")
    assert audit(s3).faults == []
    with closing(Objects.at(s3)) as objects:
        [segment] = [key for key in objects.list("journal") if "-" in key]
        objects.put(segment, (objects.get(segment) or b"").replace(b'"17"', b'"71"'))
    [fault] = audit(s3).faults
    assert "Event 21 does not follow event 20" in fault


def test_a_restored_store_has_the_chain_of_the_one_that_was_backed_up(
    place: Path | str, open_server: Open, tmp_path: Path
) -> None:
    with closing(open_server()) as store:
        for number in range(9):
            change(store, number)
    head = audit(place).head
    back_up(place, tmp_path / "saved")
    restore(tmp_path / "saved", tmp_path / "again")
    assert audit(tmp_path / "again").head == head
    with closing(AdapterStore(tmp_path / "again")) as store:
        change(store, 10)
    found = audit(tmp_path / "again", head)
    assert (found.faults, found.unchained) == ([], 0)


# Whoever edits it is noticed


def history(folder: Path, changes: int = 12) -> list[bytes]:
    with closing(AdapterStore(folder)) as store:
        for number in range(changes):
            change(store, number)
    return lines_of(folder)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "journal.jsonl").read_bytes().splitlines()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return history(tmp_path_factory.mktemp("history") / "store")


def audited(lines: list[bytes], head: str | None = None) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        return list(audit(Path(folder), head).faults)


def unchained(line: bytes) -> bytes:
    """What a release before the chain has written, or somebody who removes the chain."""
    event = json.loads(line)
    del event["chain"]
    return json.dumps(event).encode()


def edited(lines: list[bytes], how: str, random: random.Random) -> list[bytes]:
    place = random.randrange(len(lines))
    before, line, after = lines[:place], lines[place], lines[place + 1 :]
    match how:
        case "a byte is changed":
            data = bytearray(line)
            data[random.randrange(len(data))] ^= random.randrange(1, 256)
            return [*before, *bytes(data).split(b"\n"), *after]
        case "whom an event is by is changed":
            event = json.loads(line)
            return [*before, json.dumps(event | {"by": "nobody"}).encode(), *after]
        case "events are removed":
            return [*before, *after[random.randrange(max(1, len(after))) :]]
        case "an event is moved":
            others = [*before, *after]
            others.insert(random.randrange(len(lines)), line)
            return others
        case "an event is there twice":
            others = [*lines]
            others.insert(random.randrange(len(lines)), line)
            return others
        case "an event is made up":
            return [*before, unchained(line), line, *after]
        case "a chain is removed":
            return [*before, unchained(line), *after]
        case "all later chains are removed":
            return [*before, *map(unchained, [line, *after])]
    raise AssertionError(how)


HOW = (
    *("a byte is changed", "whom an event is by is changed", "events are removed"),
    *("an event is moved", "an event is there twice", "an event is made up"),
    *("a chain is removed", "all later chains are removed"),
)


@given(how=st.sampled_from(HOW), random=st.randoms(use_true_random=False))
def test_an_edit_before_the_newest_event_is_noticed(
    lines: list[bytes], how: str, random: random.Random
) -> None:
    changed = edited(lines, how, random)
    assume(changed != lines and changed[-1] == lines[-1])
    assert audited(lines) == []
    assert audited(changed)


@given(how=st.sampled_from(HOW), random=st.randoms(use_true_random=False))
def test_with_a_head_that_was_kept_every_edit_is_noticed(
    lines: list[bytes], how: str, random: random.Random
) -> None:
    changed = edited(lines, how, random)
    assume(changed[: len(lines)] != lines)
    head = audit_head(lines)
    assert audited(lines, head) == []
    assert audited(changed, head)


def audit_head(lines: list[bytes]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        return audit(Path(folder)).head


@pytest.mark.parametrize("cut", [1, 5])
def test_newest_events_that_are_cut_off_are_noticed_by_the_head_alone(
    lines: list[bytes], cut: int
) -> None:
    assert audited(lines[:-cut]) == []
    [fault] = audited(lines[:-cut], audit_head(lines))
    assert "events up to then were changed or cut off" in fault


def test_events_that_are_cut_off_under_a_running_server_are_noticed(folder: Path) -> None:
    with closing(AdapterStore(folder)) as store:
        for number in range(6):
            change(store, number)
        journal = folder / "journal.jsonl"
        with journal.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines_of(folder)[:4]))
        store.delete("a0")
    [fault] = audit(folder).faults
    assert "Event 5 does not follow event 4" in fault


@pytest.mark.fault(
    "configuration",
    "Somebody has edited the journal",
    by="the file",
    promise="The server says so and serves on; `infuse audit verify` names the place.",
)
def test_a_server_that_starts_on_an_edited_journal_says_so_and_serves_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = history(folder)
    (folder / "journal.jsonl").write_bytes(b"\n".join([*lines[:3], *lines[4:], b""]))
    with closing(AdapterStore(folder)) as store:
        assert "1 of its events do not follow the one before, first event 4" in caplog.text
        change(store, 3)
    [fault] = audit(folder).faults
    assert "Event 4 does not follow event 3" in fault


# Other releases


def test_a_journal_of_a_release_before_the_chain_is_chained_from_then_on(folder: Path) -> None:
    old = [unchained(line) for line in history(folder, 6)]
    (folder / "journal.jsonl").write_bytes(b"\n".join([*old, b""]))
    with closing(AdapterStore(folder)) as store:
        assert store.names() == ["a0", "a1", "a2"]
        for number in range(6, 9):
            change(store, number)
    found = audit(folder)
    assert (found.faults, found.unchained, len(found.entries)) == ([], 6, 9)
    for place in range(6):
        lines = lines_of(folder)
        lines[place] = lines[place].replace(b"a", b"b", 1)
        [fault] = audited(lines)
        assert "Event 7 does not follow event 6" in fault


def test_events_of_an_older_release_between_are_told_until_a_head_stands_for_them(
    folder: Path,
) -> None:
    lines = history(folder, 8)
    (folder / "journal.jsonl").write_bytes(
        b"\n".join([*lines[:6], *map(unchained, lines[6:]), b""])
    )
    with closing(AdapterStore(folder)) as store:
        change(store, 9)
        assert len(audit(folder).faults) == 2
        assert "Event 7 is not chained" in audit(folder).faults[0]
        head = audit(folder).head
        change(store, 10)
    assert audit(folder, head).faults == []
