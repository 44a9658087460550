"""Clients of a server that is killed: each changes names of its own, and knows what must hold."""

import io
import random
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from tests.api.archives import form_of, tar_of, zip_of
from tests.api.stores import ADAPTERS, ALL_USAGE, COMPLETIONS

MERGES, USAGE = "/v1/merges", "/v1/usage"
KEPT = 3
"""How many revisions the server keeps."""
FIXED = ("left", "right")
"""Adapters that nobody changes; combined and merged ones are made of them."""
METHODS = ("product", "linear", "ties")
ASKED = {"model": "left", "prompt": "A", "max_tokens": 2, "ignore_eos": True}

Send = Callable[[httpx.Client], httpx.Response]
Files = Mapping[str, bytes]


@dataclass(frozen=True)
class State:
    """What a name is at. Without revisions there is no such adapter."""

    last: int = 0
    """The last number that was given to it."""
    revisions: tuple[tuple[int, str], ...] = ()
    """Numbers and digests, oldest first."""
    description: str = ""
    pinned: bool = False
    enabled: bool = True

    @property
    def digest(self) -> str | None:
        return self.revisions[-1][1] if self.revisions else None

    def at(self, digest: str) -> "State":
        if digest == self.digest:
            return self
        number = self.last + 1
        return replace(self, last=number, revisions=(*self.revisions, (number, digest))[-KEPT:])

    def is_shown_as(self, shown: "State") -> bool:
        """Whether a server that shows this is at this state. It shows no number of what is gone."""
        return shown == self if self.revisions else shown.revisions == ()


@dataclass(frozen=True)
class Library:
    """What adapters may contain."""

    kinds: Mapping[str, Path]
    """Digest -> a folder with the files of an adapter."""
    combined: Mapping[str, str]
    """Method -> the digest of what it makes of the fixed adapters."""
    files: Mapping[str, Files]
    """Digest -> what is downloaded of it."""
    merged: bytes
    """The weights of a base with a fixed adapter in it."""


@dataclass
class Writer:
    """Makes every change of adapters, one after the other."""

    name: str
    library: Library
    choose: random.Random
    states: dict[str, State] = field(default_factory=dict)
    """What is acknowledged of each name."""
    pending: tuple[str, State] | None = None
    """The change that is not answered."""
    passed: dict[str, list[State]] = field(default_factory=dict)
    """What each name has been at while the server ran, its pending state too."""
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.states = {f"{self.name}{each}": State() for each in ("-a", "-b", "-combined")}

    def run(self, client: httpx.Client) -> None:
        """Make changes until the server does not answer."""
        self.passed = {name: [state] for name, state in self.states.items()}
        with suppress(httpx.TransportError):
            while True:
                self._change(client)

    def settle(self, name: str, shown: State) -> None:
        """Note what a name is at after a kill. Fails where a change is lost or made by half."""
        before, pending = self.states[name], self.pending
        may_be = [before, *([pending[1]] if pending is not None and pending[0] == name else [])]
        found = [each for each in may_be if each.is_shown_as(shown)]
        assert found, f"{name} is at {shown}, and was at one of {may_be}"
        self.states[name] = found[-1] if shown.revisions else replace(shown, last=before.last)

    def _change(self, client: httpx.Client) -> None:
        name, state = self.choose.choice(list(self.states.items()))
        kinds = ["replace", "replace", "describe", "pin", "disable", "delete", "roll back"]
        if not state.revisions:
            kinds = ["combine" if name.endswith("combined") else "create"]
        kind = self.choose.choice(kinds)
        new, send = self._planned(kind, name, state)
        self.pending = name, new
        self.passed[name].append(new)
        answer = send(client)
        assert answer.is_success, f"{kind} {name}: {answer.status_code} {answer.text}"
        if new.revisions:
            made = answer.json()
            assert (made["revision"], made["digest"]) == new.revisions[-1], (kind, made)
        self.states[name], self.pending = new, None
        self.done[kind] += 1

    def _planned(self, kind: str, name: str, state: State) -> tuple[State, Send]:
        path = f"{ADAPTERS}/{name}"
        match kind:
            case "create":
                digest, sent = self._upload(name)
                return state.at(digest), lambda client: client.post(ADAPTERS, **sent)
            case "replace":
                digest, sent = self._upload(None)
                return state.at(digest), lambda client: client.put(path, **sent)
            case "combine":
                method = self.choose.choice(METHODS)
                body = {"name": name, "method": method}
                body |= {"adapters": [{"name": each} for each in FIXED]}
                new = state.at(self.library.combined[method])
                return new, lambda client: client.post(f"{ADAPTERS}/combine", json=body)
            case "roll back":
                number, digest = self.choose.choice(state.revisions)
                sent = {"json": {"revision": number}}
                return state.at(digest), lambda client: client.post(f"{path}/rollback", **sent)
            case "delete":
                return State(state.last), lambda client: client.delete(path)
        text = f"{self.choose.random()}"
        details: dict[str, Any] = {"description": text} if kind == "describe" else {}
        details |= {"pinned": not state.pinned} if kind == "pin" else {}
        details |= {"enabled": not state.enabled} if kind == "disable" else {}
        return replace(state, **details), lambda client: client.patch(path, json=details)

    def _upload(self, name: str | None) -> tuple[str, dict[str, Any]]:
        """The digest of an upload, and what is sent: files, an archive, or where they are."""
        digest, folder = self.choose.choice(list(self.library.kinds.items()))
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        named = {} if name is None else {"name": name}
        match self.choose.choice(["form", "zip", "tar", "source"]):
            case "form":
                return digest, {"data": named, "files": form_of(files)}
            case "zip":
                return digest, {"data": named, "files": {"archive": zip_of(files)}}
            case "tar":
                return digest, {"data": named, "files": {"archive": tar_of(files)}}
        return digest, {"json": named | {"source": f"file://{folder}"}}


@dataclass
class Merger:
    """Starts, cancels, waits for and deletes merges."""

    choose: random.Random
    jobs: dict[str, str] = field(default_factory=dict)
    """Id -> what must hold: "there", "succeeded", "not succeeded" or "gone"."""
    pending: str | None = None
    """The job whose deletion is not answered; "" for a start that is not."""
    done: Counter[str] = field(default_factory=Counter)

    def run(self, client: httpx.Client) -> None:
        with suppress(httpx.TransportError):
            for job in [job for job, known in self.jobs.items() if known != "gone"]:
                self._delete(client, job)
            self.jobs = {}
            while True:
                self._merge(client)

    def _merge(self, client: httpx.Client) -> None:
        self.pending = ""
        answer = client.post(MERGES, json={"adapter": FIXED[0]})
        assert answer.status_code == 202, answer.text
        job = str(answer.json()["id"])
        self.jobs[job], self.pending = "there", None
        self.done["merge started"] += 1
        if self.choose.random() < 0.5:
            self.pending = job
            assert client.delete(f"{MERGES}/{job}").status_code == 204
            self.jobs[job], self.pending = "not succeeded", None
            self.done["merge cancelled"] += 1
            return
        while (state := client.get(f"{MERGES}/{job}").json()["state"]) != "succeeded":
            assert state in ("queued", "running")
            time.sleep(0.02)
        self.jobs[job] = "succeeded"
        if self.choose.random() < 0.5:
            self._delete(client, job)

    def _delete(self, client: httpx.Client, job: str) -> None:
        """Delete a job, which may run still."""
        self.pending = job
        while client.delete(f"{MERGES}/{job}").status_code != 404:
            time.sleep(0.02)
        self.jobs[job], self.pending = "gone", None
        self.done["merge deleted"] += 1

    def check(self, client: httpx.Client, library: Library) -> set[str]:
        """Compare with what the server has; return the jobs whose models it keeps."""
        found = {each["id"]: each["state"] for each in client.get(MERGES).json()["data"]}
        strangers = found.keys() - self.jobs.keys()
        assert len(strangers) <= (self.pending == ""), strangers
        for job, known in self.jobs.items():
            state = found.get(job, "gone")
            assert state not in ("queued", "running"), f"{job} is {state} after a start"
            if job == self.pending:
                continue
            assert known != "gone" or state == "gone", f"{job} was deleted and is {state}"
            assert known != "there" or state != "gone", f"{job} is lost"
            assert known != "succeeded" or state == "succeeded", f"{job} is {state}"
            assert known != "not succeeded" or state != "succeeded", f"{job} is {state}"
        succeeded = {job for job, state in found.items() if state == "succeeded"}
        for job in succeeded:
            assert merged_weights(client, job) == library.merged
        self.jobs = dict.fromkeys(found, "there")
        self.pending = None
        return succeeded


def merged_weights(client: httpx.Client, job: str) -> bytes:
    answer = client.get(f"{MERGES}/{job}/archive")
    assert answer.status_code == 200, answer.text
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        weights = archive.extractfile(f"{job}/model.safetensors")
        assert weights is not None
        return weights.read()


@dataclass
class Asker:
    """Asks the model, so that usage is written."""

    asked: int = 0
    answered: int = 0

    def run(self, client: httpx.Client) -> None:
        with suppress(httpx.TransportError):
            while True:
                self.asked += 1
                answer = client.post(COMPLETIONS, json=ASKED)
                assert answer.status_code == 200, answer.text
                self.answered += 1

    def check(self, client: httpx.Client) -> None:
        rows = client.get(USAGE, params=ALL_USAGE).json()["data"]
        counted = sum(each["requests"] for each in rows)
        assert self.answered <= counted <= self.asked, (self.answered, counted, self.asked)
