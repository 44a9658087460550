"""The store against a dictionary, through any sequence of changes and restarts."""

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from infuse.adapters.errors import AdapterExists, RevisionConflict, UnknownAdapter, UnknownRevision
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.buckets import open_bucket
from tests.adapters.storage.replicas import replica
from tests.adapters.storage.store_contents import content_of, create, replace

names = st.sampled_from(["a", "b", "B"])
contents = st.sampled_from("xyz")


KEEP = 3


class StoreMachine(RuleBasedStateMachine):
    """`alive`: name -> revision number -> content. `last`: name -> the last number given."""

    open_store = staticmethod(AdapterStore)

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp()) / "store"
        self.store = self.open_store(self.folder, KEEP)
        self.alive: dict[str, dict[int, str]] = {}
        self.said: dict[str, str] = {}
        self.last: dict[str, int] = {}

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder.parent)

    def current(self, name: str) -> str:
        return self.alive[name][self.last[name]]

    def note(self, name: str, content: str) -> None:
        self.last[name] = self.last.get(name, 0) + 1
        revisions = self.alive.setdefault(name, {})
        revisions[self.last[name]] = content
        for number in sorted(revisions)[:-KEEP]:
            del revisions[number]

    @rule(name=names, content=contents)
    def create(self, name: str, content: str) -> None:
        if name in self.alive:
            with pytest.raises(AdapterExists):
                create(self.store, name, content)
        else:
            revision = create(self.store, name, content)
            self.note(name, content)
            assert revision.number == self.last[name]

    @rule(name=names, content=contents)
    def replace(self, name: str, content: str) -> None:
        if name not in self.alive:
            with pytest.raises(UnknownAdapter):
                replace(self.store, name, content)
            return
        revision, changed = replace(self.store, name, content)
        assert changed == (self.current(name) != content)
        if changed:
            self.note(name, content)
        assert revision.number == self.last[name]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), content=contents)
    def replace_what_was_seen(self, data: st.DataObject, content: str) -> None:
        """Change with the ETag of any revision: only the current one's is accepted."""
        name = data.draw(st.sampled_from(sorted(self.alive)))
        number = data.draw(st.sampled_from(sorted(self.alive[name])))
        etag = self.store.revision(name, number).etag
        if number == self.last[name]:
            _, changed = replace(self.store, name, content, if_match=etag)
            if changed:
                self.note(name, content)
        else:
            with pytest.raises(RevisionConflict):
                replace(self.store, name, content, if_match=etag)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        number, content = data.draw(st.sampled_from(sorted(self.alive[name].items())))
        _, changed = self.store.roll_back(name, number)
        assert changed == (self.current(name) != content)
        if changed:
            self.note(name, content)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), text=st.sampled_from(["", "x", "y"]))
    def describe(self, data: st.DataObject, text: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        self.store.describe(name, DetailsChange(description=text))
        self.said[name] = text

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.alive:
            self.store.delete(name)
            del self.alive[name]
            self.said.pop(name, None)
        else:
            with pytest.raises(UnknownAdapter):
                self.store.delete(name)

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = self.open_store(self.folder, KEEP)

    @invariant()
    def every_reachable_revision_is_whole(self) -> None:
        for name, revisions in self.alive.items():
            assert self.store.current(name).number == self.last[name]
            assert self.store.details(name).description == self.said.get(name, "")
            for number in range(self.last[name] + 2):
                if number in revisions:
                    revision = self.store.revision(name, number)
                    assert content_of(self.store, revision) == revisions[number]
                else:
                    with pytest.raises(UnknownRevision):
                        self.store.revision(name, number)

    @invariant()
    def the_names_are_the_living_ones(self) -> None:
        assert self.store.names() == sorted(self.alive)
        assert len(self.store) == len(self.alive)
        assert all((name in self.store) == (name in self.alive) for name in ("a", "b", "B"))

    @invariant()
    def the_folder_holds_no_more_than_what_is_reachable(self) -> None:
        reachable = {content for each in self.alive.values() for content in each.values()}
        assert len(list(self.folder.glob("content/*"))) == len(reachable)
        assert list(self.folder.parent.glob("*/staging/*/*")) == []


class BucketMachine(StoreMachine):
    open_store = staticmethod(open_bucket)

    @rule()
    def empty_the_cache(self) -> None:
        """Remove files from the cache, as others may."""
        for file in sorted(self.folder.with_name("cache").glob("content/*/*"))[::2]:
            file.unlink()


class TwoServersMachine(StoreMachine):
    """Two servers share the folder, and take turns in everything."""

    storage = "a folder"

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp()) / "store"
        self.stores = [replica(self.storage, self.folder, KEEP) for _ in range(2)]
        self.turns = itertools.cycle(range(2))
        self.alive, self.said, self.last = {}, {}, {}

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.folder.parent)

    @property
    def store(self) -> AdapterStore:
        return self.stores[next(self.turns)]

    @rule()
    def open_again(self) -> None:
        turn = next(self.turns)
        self.stores[turn].close()
        self.stores[turn] = replica(self.storage, self.folder, KEEP)


class TwoServersInABucketMachine(TwoServersMachine):
    storage = "a bucket"


FEW = settings(max_examples=12, stateful_step_count=25, deadline=None)
TwoServersMachine.TestCase.settings = TwoServersInABucketMachine.TestCase.settings = FEW
TestTwoServersThroughAnySequence = TwoServersMachine.TestCase
TestTwoServersInABucketThroughAnySequence = TwoServersInABucketMachine.TestCase
SETTINGS = settings(max_examples=60, stateful_step_count=25, deadline=None)
StoreMachine.TestCase.settings = BucketMachine.TestCase.settings = SETTINGS
TestStoreThroughAnySequence = StoreMachine.TestCase
TestStoreInABucketThroughAnySequence = BucketMachine.TestCase
