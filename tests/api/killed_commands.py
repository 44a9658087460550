"""Commands that are killed beside a server: each knows what must hold of what it writes."""

import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import psutil

from infuse.adapters.errors import BackupRefused
from infuse.adapters.storage.backup import restore
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.store import AdapterStore
from infuse.server.keys.key_file import edited, read_entries
from tests.adapters.storage.crash_worker import storage_at
from tests.api.killed_clients import State, Writer
from tests.api.replica_starter import ENDED
from tests.api.replicas import Replicas, wait_for_end

MANY = 60
"""Adapters of the backup that is restored."""
Where = Path | str
Shown = dict[str, State]


@dataclass
class Command:
    """Starts `infuse …`, and kills it."""

    servers: Replicas
    folder: Path
    choose: random.Random
    done: Counter[str] = field(default_factory=Counter)
    """What was acknowledged, and what was killed."""

    def start(self, *arguments: str) -> None:
        self._log = self.folder / f"log-of-{arguments[0]}"
        self._log.write_text("")
        self._process = psutil.Process(self.servers.start(self._log, *arguments))

    def close(self) -> None:
        """Nothing is left to look at."""

    def kill(self) -> bool:
        """Whether it was done before."""
        with suppress(psutil.NoSuchProcess):
            self._process.kill()
        wait_for_end(self._process)
        text = self._log.read_text()
        assert ENDED not in text or f"{ENDED} 0" in text, text
        return ENDED in text


class Keys(Command):
    """`infuse keys create`, `rotate` and `revoke`."""

    @property
    def file(self) -> Path:
        return self.folder / "keys.json"

    def begin(self) -> None:
        self.before = self._keys()
        kind = self.choose.choice(["create", "rotate", "revoke"]) if self.before else "create"
        self.kind, self.number = kind, self.done.total()
        self.name = f"k{self.number}" if kind == "create" else self.choose.choice(self.before)[0]
        self.start("keys", kind, self.name, f"--file={self.file}")

    def check(self) -> None:
        is_done = self.kill()
        after = self._keys()
        others = [key for key in self.before if key[0] != self.name]
        own = [key for key in after if key[0] == self.name]
        assert [key for key in after if key not in own] == others
        if after == self.before:
            assert not is_done, f"{self.kind} {self.name} is lost"
        else:
            assert len(own) == (self.kind != "revoke")
        self.done[f"keys {self.kind} {'done' if is_done else 'killed'}"] += 1
        if self.file.exists():
            with edited(self.file):
                """The next edit removes what a kill has left."""
        left = {each.name for each in self.folder.glob("*keys.json*")}
        assert left <= {"keys.json", ".keys.json.lock"}, left

    def _keys(self) -> list[tuple[str, str]]:
        if not self.file.exists():
            return []
        return [(each["name"], each["id"]) for each in read_entries(self.file)]


@dataclass
class Backups(Command):
    """`infuse backup` of the store, while its server runs and is killed."""

    store: Where = ""
    writers: Sequence[Writer] = ()
    numbers: Iterator[int] = field(default_factory=count)

    def begin(self) -> None:
        self.target = beside(self.store, self.folder, f"backup{next(self.numbers)}")
        self.start("backup", str(self.target), f"--adapters-dir={self.store}")

    def check(self) -> None:
        is_done = self.kill()
        made = self.folder / "restored"
        self.done[f"backup {'done' if is_done else 'killed'}"] += 1
        try:
            restore(self.target, made)
        except BackupRefused:
            assert not is_done
            return
        finally:
            remove(self.target)
        shown = read_all(made, self.folder)
        for writer in self.writers:
            for name, passed in writer.passed.items():
                now = shown.get(name, State())
                assert any(each.is_shown_as(now) for each in passed), f"{name}: {now}, {passed}"
        shutil.rmtree(made)


@dataclass
class Restores(Command):
    """`infuse restore` of a backup with many adapters."""

    saved: Path = Path()
    store: Where = ""
    """Where the server's adapters are: what is restored goes beside them."""
    numbers: Iterator[int] = field(default_factory=count)
    killed: list[Where] = field(default_factory=list)
    """Where a restore was killed that is not looked at yet."""

    def begin(self) -> None:
        self.target = beside(self.store, self.folder, f"again{next(self.numbers)}")
        self.start("restore", str(self.saved), f"--adapters-dir={self.target}")

    def check(self) -> None:
        is_done = self.kill()
        self.done[f"restore {'done' if is_done else 'killed'}"] += 1
        if is_done:
            assert len(read_all(self.target, self.folder)) == MANY
            remove(self.target)
        else:
            self.killed.append(self.target)
        if len(self.killed) >= self._at_once:
            self.close()

    @property
    def _at_once(self) -> int:
        """The bucket of a killed restore is free when its lease has been watched for 30 seconds."""
        return 1 if isinstance(self.store, Path) else 8

    def close(self) -> None:
        with ThreadPoolExecutor(self._at_once) as threads:
            list(threads.map(self._look, self.killed))
        self.killed.clear()

    def _look(self, target: Where) -> None:
        # In a bucket a second restore is refused once a server has started there.
        if isinstance(target, Path) and self.choose.random() < 0.5:
            assert len(read_all(target, self.folder)) in (0, MANY)
        with suppress(BackupRefused):
            restore(self.saved, target)
        assert len(read_all(target, self.folder)) == MANY
        remove(target)


def beside(store: Where, folder: Path, name: str) -> Where:
    """A place that is free, of the same kind as a store."""
    return folder / name if isinstance(store, Path) else f"{store}-{name}"


def remove(where: Where) -> None:
    if isinstance(where, Path):
        # What was killed may have made nothing.
        if where.exists():
            shutil.rmtree(where)
    else:
        with closing(Objects.at(where)) as objects:
            objects.delete(objects.list(""))


def read_all(store: Where, folder: Path) -> Shown:
    """Open a store that no server has, and read it whole. Nothing else may be in it."""
    cache = tempfile.mkdtemp(dir=folder)
    opened = storage_at(str(store), None if isinstance(store, Path) else cache)
    with closing(AdapterStore(opened)) as adapters:
        for name in adapters.names():
            for revision in adapters.revisions(name):
                adapters.read(revision, ())
        shown = {name: state_of(adapters, name) for name in adapters.names()}
    if isinstance(store, Path):
        digests = {each[1] for state in shown.values() for each in state.revisions}
        assert {each.name for each in (store / "content").iterdir()} == digests
        assert list((store / "staging").iterdir()) == []
    shutil.rmtree(cache)
    return shown


def state_of(store: AdapterStore, name: str) -> State:
    revisions = [(each.number, each.digest) for each in reversed(store.revisions(name))]
    details = store.details(name)
    texts = details.description, details.pinned, details.enabled
    return State(revisions[-1][0], tuple(revisions), *texts)
