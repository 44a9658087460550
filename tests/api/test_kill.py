"""A server, and commands beside it, killed while everything that writes is under way.

After each kill a server starts on what is left: nothing acknowledged is lost, nothing is there by
half, and nothing is left that no adapter and no merge needs. What `infuse backup`, `infuse restore`
and `infuse keys` write is opened without a server.
"""

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from infuse.adapters.storage.audit import audit
from infuse.adapters.storage.backup import back_up
from infuse.adapters.storage.folder import digest_of
from infuse.adapters.storage.index import Index
from infuse.adapters.storage.outside import events_of, opened
from infuse.adapters.storage.store import AdapterStore
from infuse.server.settings import Settings
from tests.adapters.storage.store_contents import create
from tests.api.archives import CONFIG, WEIGHTS
from tests.api.killed_clients import (
    FIXED,
    KEPT,
    MERGES,
    METHODS,
    Asker,
    Files,
    Library,
    Merger,
    State,
    Writer,
    merged_weights,
)
from tests.api.killed_commands import MANY, Backups, Command, Keys, Restores
from tests.api.oracle import upload
from tests.api.replicas import Replicas, replicas
from tests.api.stores import ADAPTERS, Place
from tests.api.stores import place as place
from tests.api.test_streaming import eventually

WRITERS = 3
MOMENTS = (0.05, 1.0)
"""Between these many seconds of a server's life it is killed."""
SOME, ALL = (3, 500) if Settings().engine == "native" else (2, 20)
"""How many kills in a place. vLLM takes most of a minute to start after each."""


@dataclass
class Lives:
    """A server that lives again and again, and all that is done with it."""

    servers: Replicas
    place: Place
    library: Library
    choose: random.Random
    writers: list[Writer]
    merger: Merger
    asker: Asker
    commands: list[Command]
    interrupted: int = 0
    """Changes that were not answered when the server was killed."""
    head: str | None = None
    """The digest of the journal when it was last looked at."""

    def live(self) -> None:
        """Let clients and commands write, kill the server and them, and compare."""
        [server] = self.servers.alive
        clients = [*self.writers, self.merger, self.asker]
        children = psutil.Process(server.pid).children(recursive=True)
        with ThreadPoolExecutor(len(clients)) as threads:
            running = [threads.submit(each.run, server.client) for each in clients]
            for command in self.commands:
                command.begin()
            time.sleep(self.choose.uniform(*MOMENTS))
            early = [each.result() for each in running if each.done()]
            server.kill()
        assert early == [], "a client had no answer before the kill"
        for each in running:
            each.result()
        for command in self.commands:
            command.check()
        assert psutil.wait_procs(children, timeout=60)[1] == []
        self.servers.replace(server)
        self.check(self.servers.alive[0].client)

    def check(self, client: httpx.Client) -> None:
        for writer in self.writers:
            self.interrupted += writer.pending is not None
            for name in writer.states:
                writer.settle(name, shown := shown_of(client, name))
                if shown.digest is not None:
                    assert downloaded(client, name) == self.library.files[shown.digest]
            writer.pending = None
        kept = self.merger.check(client, self.library)
        self.asker.check(client)
        assert eventually(lambda: self.strangers(kept) == []), self.strangers(kept)
        found = audit(self.where, self.head)
        assert found.faults == []
        self.head = found.head

    @property
    def done(self) -> Counter[str]:
        """How often each thing was done or killed."""
        changes = sum((each.done for each in self.writers), self.merger.done)
        others = {"answered": self.asker.answered, "interrupted": self.interrupted}
        others["acknowledged"] = changes.total()
        return sum((each.done for each in self.commands), changes + Counter(others))

    @property
    def where(self) -> Path | str:
        where: Path | str = self.place.settings["adapters_dir"]
        return where

    def strangers(self, merges: set[str]) -> list[str]:
        """What is kept though nothing needs it, or is not as it was stored. `merges`: those whose
        models are kept."""
        with opened(self.where) as outside:
            events, index = events_of(outside.lines()), Index()
            index.apply(events)
            places = {outside.contents(events).place_of(each): each for each in index.digests()}
            found: dict[str, dict[str, bytes | None]] = {place: {} for place in places}
            for key in outside.objects.list("content"):
                place, _, file = key.rpartition("/")
                found.setdefault(place, {})[file] = outside.objects.get(key)
        strangers = [
            place
            for place, files in found.items()
            if place not in places or files != self.library.files[places[place]]
        ]
        folder = self.servers.folder
        own = {"lock", *(f"{each}.json" for each in self.merger.jobs), *merges}
        strangers += [each for each in os.listdir(folder / "merges0") if each not in own]
        for content in (self.place.folder, folder / "adapters-cache0"):
            if content.exists():
                allowed = {"content", "staging", "lock", "journal.jsonl"}
                strangers += [each for each in os.listdir(content) if each not in allowed]
                strangers += os.listdir(content / "staging")
                contents = set(os.listdir(content / "content"))
                strangers += sorted(contents - index.digests())
        return strangers


def shown_of(client: httpx.Client, name: str) -> State:
    answer = client.get(f"{ADAPTERS}/{name}")
    if answer.status_code == 404:
        return State()
    now = answer.json()
    found = client.get(f"{ADAPTERS}/{name}/revisions").json()["data"]
    revisions = tuple((each["revision"], each["digest"]) for each in reversed(found))
    details = now["description"], now["pinned"], now["enabled"]
    return State(now["revision"], revisions, *details)


def downloaded(client: httpx.Client, name: str) -> Files:
    found = {}
    for file in (CONFIG, WEIGHTS):
        answer = client.get(f"{ADAPTERS}/{name}/files/{file}")
        assert answer.status_code == 200, answer.text
        found[file] = answer.content
    return found


def library_of(client: httpx.Client, folders: dict[str, Path], root: Path) -> Library:
    """Learn what adapters may contain, and leave the fixed ones."""
    kinds, files = {}, {}
    for name, saved in folders.items():
        folder = root / name
        folder.mkdir(parents=True)
        for file in (CONFIG, WEIGHTS):
            (folder / file).write_bytes((saved / file).read_bytes())
        digest = digest_of(folder)[0]
        kinds[digest] = folder
        files[digest] = {file: (folder / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    for name, folder in zip(FIXED, kinds.values(), strict=False):
        assert upload(client, name, folder).status_code == 201
    combined = {}
    for method in METHODS:
        parts = [{"name": each} for each in FIXED]
        body = {"name": "made", "method": method, "adapters": parts}
        made = client.post(f"{ADAPTERS}/combine", json=body)
        assert made.status_code == 201, made.text
        combined[method] = made.json()["digest"]
        files[combined[method]] = downloaded(client, "made")
        assert client.delete(f"{ADAPTERS}/made").status_code == 204
    job = client.post(MERGES, json={"adapter": FIXED[0]}).json()["id"]
    path = f"{MERGES}/{job}"
    assert eventually(lambda: client.get(path).json()["state"] == "succeeded")
    merged = merged_weights(client, job)
    assert client.delete(path).status_code == 204
    return Library(kinds, combined, files, merged)


def saved_backup(folder: Path) -> Path:
    """A backup of many adapters. No server reads them."""
    with closing(AdapterStore(folder / "many")) as store:
        for number in range(MANY):
            create(store, f"a{number}", f"{number}")
    back_up(folder / "many", folder / "saved")
    return folder / "saved"


@pytest.fixture
def lives(
    place: Place, model_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> Iterator[Lives]:
    """A server with little but what its clients know of."""
    root, where = tmp_path / "kinds", place.settings["adapters_dir"]
    flags = [f"--model={model_folder}", "--served-model-name=tiny", "--max-batch-rows=4"]
    flags += [f"--adapters-dir={where}", f"--keep-revisions={KEPT}", "--kv-cache-tokens=2048"]
    flags += [f"--source-prefixes=file://{root}"]
    with replicas(tmp_path, 1, flags) as servers:
        library = library_of(servers.alive[0].client, adapter_folders, root)
        choose = random.Random(0)
        writers = [Writer(f"w{each}", library, choose) for each in range(WRITERS)]
        saved = saved_backup(tmp_path)
        commands: list[Command] = [
            Keys(servers, tmp_path, choose),
            Backups(servers, tmp_path, choose, store=where, writers=writers),
            Restores(servers, tmp_path, choose, store=where, saved=saved),
        ]
        yield Lives(servers, place, library, choose, writers, Merger(choose), Asker(), commands)


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(SOME, marks=pytest.mark.timeout(600)),
        pytest.param(ALL, marks=[pytest.mark.full, pytest.mark.timeout(4 * 3600)]),
    ],
)
def test_whenever_a_server_is_killed_one_start_finds_all_that_it_has_acknowledged_and_no_more(
    lives: Lives, kills: int, record_property: Callable[[str, object], None]
) -> None:
    for _ in range(kills):
        lives.live()
    for command in lives.commands:
        command.close()

    done = lives.done
    print(f"{kills} kills of a server, of commands and what was done: {dict(done)}")
    record_property("kills", kills)
    record_property("done", dict(done))
    assert done["acknowledged"] > kills
    assert done["interrupted"] > kills / 2
