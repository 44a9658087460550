"""The journal in a bucket: of several processes that open it, only the last one writes."""

import uuid
from collections.abc import Callable, Iterable
from itertools import count

import obstore
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from obstore.store import MemoryStore

from infuse.adapters.errors import StoreLocked, StoreUnreachable
from infuse.adapters.storage.bucket_journal import BucketJournal
from infuse.adapters.storage.objects import Objects


class LossyObjects(Objects):
    """A bucket behind a network that loses some of the next requests, or their answers."""

    def __init__(self) -> None:
        self.inside = MemoryStore()
        super().__init__(self.inside, "memory://")
        self.lose: list[str] = []
        self.meanwhile: Callable[[], None] | None = None
        """Called between two pages of the next listing."""
        self.page = 5
        """After how many tenths of the keys the first page ends."""

    def list(self, prefix: str) -> list[str]:
        before = sorted(super().list(prefix))
        if self.meanwhile is None or not before:
            return before
        happens, self.meanwhile = self.meanwhile, None
        happens()
        page = before[len(before) * self.page // 10]
        after = sorted(super().list(prefix))
        return [key for key in before if key <= page] + [key for key in after if key > page]

    def create(self, key: str, data: bytes) -> bool:
        lost = self.lose.pop(0) if self.lose else "nothing"
        if lost == "request":
            raise StoreUnreachable(key)
        created = super().create(key, data)
        if lost == "answer":
            raise StoreUnreachable(key)
        return not lost.startswith("first answer") and created

    def delete(self, keys: Iterable[str]) -> None:
        keys = sorted(keys)
        if "delete" in self.lose:
            self.lose.remove("delete")
            super().delete(keys[::2])
            raise StoreUnreachable("half of them are there")
        super().delete(keys)


@pytest.fixture
def objects() -> LossyObjects:
    return LossyObjects()


def opened(objects: Objects) -> tuple[BucketJournal, list[str]]:
    journal = BucketJournal(objects, uuid.uuid4().hex)
    return journal, [event["name"] for event in journal.read()]


def append(journal: BucketJournal, name: str) -> None:
    journal.append({"event": "details", "name": name})


def test_events_come_back_in_their_order(objects: Objects) -> None:
    journal, _ = opened(objects)
    for name in "abc":
        append(journal, name)
    assert opened(objects)[1] == ["a", "b", "c"]


def test_a_segment_replaces_the_events_in_it_but_those_that_opened(objects: Objects) -> None:
    for name in "abc":
        append(opened(objects)[0], name)
    journal, _ = opened(objects)
    journal.compact()
    assert sorted(objects.list("journal")) == [
        "journal/000000000001-000000000007.jsonl",
        *(f"journal/{number:012}.jsonl" for number in (1, 3, 5, 7)),
    ]
    append(journal, "d")
    assert opened(objects)[1] == ["a", "b", "c", "d"]


def test_segments_stay_few_and_short_ones_are_joined(objects: Objects) -> None:
    journal, _ = opened(objects)
    for number in range(200):
        append(journal, str(number))
        if number % 5 == 0:
            journal.compact()
    segments = [key for key in objects.list("journal") if "-" in key]
    assert len(segments) < 6
    assert opened(objects)[1] == [str(number) for number in range(200)]


@pytest.mark.parametrize("compacts", [False, True])
def test_whoever_had_the_journal_before_cannot_append(objects: Objects, compacts: bool) -> None:
    before, _ = opened(objects)
    append(before, "a")
    after, names = opened(objects)
    append(after, "b")
    if compacts:
        after.compact()
    for _ in range(2):
        with pytest.raises(StoreLocked, match="another server has taken over"):
            append(before, "c") if not before.in_doubt else before.settle()
    append(after, "d")
    assert names == ["a"]
    assert opened(objects)[1] == ["a", "b", "d"]


def test_a_damaged_and_a_missing_event_take_no_other(
    objects: LossyObjects, caplog: pytest.LogCaptureFixture
) -> None:
    journal, _ = opened(objects)
    for name in "abcd":
        append(journal, name)
    obstore.put(objects.inside, "journal/000000000003.jsonl", b'{\n"x":1}\n')
    objects.delete(["journal/000000000004.jsonl"])
    again, names = opened(objects)
    assert names == ["a", "d"]
    assert "Event 3 is damaged" in caplog.text
    assert "1 events are gone" in caplog.text
    append(again, "e")
    again.compact()
    assert opened(objects)[1] == ["a", "d", "e"]


@pytest.mark.parametrize("page", range(10))
@pytest.mark.parametrize("events", [1, 2, 3, 5])
@pytest.mark.parametrize("joined", [0, 6])
def test_events_that_move_into_a_segment_while_they_are_listed_are_found(
    page: int, events: int, joined: int
) -> None:
    objects = LossyObjects()
    opened(objects)
    before, _ = opened(objects)
    expected = [str(number) for number in range(joined + events)]
    for number, name in enumerate(expected):
        if number == joined:
            before.compact()
        append(before, name)
    objects.page, objects.meanwhile = page, before.compact
    after, names = opened(objects)
    assert names == expected
    append(after, "more")
    assert opened(objects)[1] == [*expected, "more"]


LOSSES = st.lists(st.sampled_from(["nothing", "request", "answer", "first answer"]), max_size=2)


class JournalMachine(RuleBasedStateMachine):
    """Processes open the journal one after the other; each goes on trying to append.

    What is acknowledged stays, in its order; what failed in the network is there or not; what was
    refused is not.
    """

    @initialize()
    def start(self) -> None:
        self.objects = LossyObjects()
        self.ids = count()
        self.acknowledged: list[str] = []
        self.doubtful: set[str] = set()
        self.said: dict[BucketJournal, str] = {}
        """The event of which a process does not know whether it was written."""
        self.never: set[str] = set()
        self.processes: list[BucketJournal] = []
        self.open()

    @rule(page=st.none() | st.integers(0, 9))
    def open(self, page: int | None = None) -> None:
        """`page`: how far a listing is when the process before compacts, in tenths."""
        self.objects.lose = []
        if page is not None and self.processes:
            self.objects.page = page
            self.objects.meanwhile = self.processes[-1].compact
        journal, names = opened(self.objects)
        assert [name for name in names if name in self.acknowledged] == self.acknowledged
        assert set(names) <= {*self.acknowledged, *self.doubtful}
        assert len(names) == len(set(names))
        assert not self.never & set(names)
        # From here on they have happened, or never will.
        self.acknowledged, self.doubtful = names, set()
        self.processes.append(journal)

    @rule(data=st.data(), losses=LOSSES)
    def append(self, data: st.DataObject, losses: list[str]) -> None:
        process = data.draw(st.sampled_from(self.processes))
        owns = process is self.processes[-1]
        name = str(next(self.ids))
        self.objects.lose = list(losses)
        try:
            settled = [event["name"] for event in process.settle()]
            self.never |= {self.said.pop(process, "")} - set(settled)
            if owns:
                assert set(settled) <= self.doubtful
                self.acknowledged += settled
                self.doubtful = set()
            assert set(settled) <= set(self.acknowledged)
            append(process, name)
            assert owns
            self.acknowledged.append(name)
        except StoreUnreachable:
            assert process.in_doubt
            self.said.setdefault(process, name)
            if owns:
                self.doubtful.add(name)
        except StoreLocked:
            assert not owns

    @rule(data=st.data(), crashes=st.booleans())
    def compact(self, data: st.DataObject, crashes: bool) -> None:
        self.objects.meanwhile = None
        self.objects.lose = ["nothing", "delete"] if crashes else []
        try:
            data.draw(st.sampled_from(self.processes)).compact()
        except StoreUnreachable:
            assert crashes

    def teardown(self) -> None:
        self.open()
        self.objects.close()


JournalMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestJournalOfSeveralProcesses = JournalMachine.TestCase
