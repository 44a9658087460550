"""Limited processes for what strangers bring: their tokenizers and their chat templates.

None of it runs in the process that serves. `sandboxed` runs as a process that holds the base's
tokenizer, begun when the first adapter needs it, and forks a worker for each tokenizer, and for
each chat template one that is kept for its next conversation.
"""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import SandboxUnavailable
from adapters.vocabulary import sandboxed

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Forking wants one thread."""
_PASSED_ON = ("LD_LIBRARY_PATH", "TZ")
START_SECONDS = 120.0
_END_SECONDS = 0.2
"""A worker that ends with its process does so a moment before."""
_MOST_ANSWER = 64 << 20
_KEPT = 8
"""Workers that wait for their template's next conversation."""
_RENDERING = 4
"""Workers that compute for requests."""
_READING = 2
"""Workers that read what adapters bring, most of it at uploads: these hold up no conversation."""
_SMALL: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "Hello"},)
"""The conversation that a template is tried on."""
_may_wait: ContextVar[bool] = ContextVar("may_wait", default=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one job may take."""

    cpu_seconds: float
    wall_seconds: float
    """On a machine too busy for `cpu_seconds` of work."""
    memory: int
    """Bytes of addresses, beyond those of the process that it is forked from."""

    def __str__(self) -> str:
        seconds = f"{self.cpu_seconds:g} seconds of computing, {self.wall_seconds:g} seconds in all"
        return f"{seconds}, or {self.memory >> 20} MiB of memory"


TOKENIZER = Limits(cpu_seconds=20, wall_seconds=60, memory=2 << 30)
TEMPLATE = Limits(cpu_seconds=2, wall_seconds=10, memory=512 << 20)


class Exceeded(Exception):
    """A job went beyond its limits; says which, for the sentence 'takes more than …'."""


class WouldWait(Exception):
    """A limited process would have to be waited for; `key` names what for."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within, on this thread: what would wait for a limited process raises WouldWait instead."""
    token = _may_wait.set(False)
    try:
        yield
    finally:
        _may_wait.reset(token)


class Sandbox:
    """Thread-safe. Starts no process before the first job.

    Jobs raise Exceeded, SandboxUnavailable where no process can be had, and WouldWait.
    """

    def __init__(self, base: Callable[[], str]) -> None:
        """`base`: the base's tokenizer as JSON."""
        self._base = base
        self._mutex = threading.Lock()
        self._rendering = threading.BoundedSemaphore(_RENDERING)
        self._reading = threading.BoundedSemaphore(_READING)
        self._closed = False
        self._process: _Process | None = None
        self._kept: OrderedDict[str, _Worker] = OrderedDict()
        """Template -> a worker that has compiled it, least recently used first."""

    def compare(self, tokenizer: bytes, key: str) -> dict[str, Any]:
        """See `sandboxed.compare`. `key`: of these bytes, for WouldWait."""
        self._check_patience(key)
        with self._reading, closing(self._worker()) as worker:
            return self._ask(worker, {"kind": "tokenizer"}, TOKENIZER, tokenizer)

    def try_template(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """As `render`, of a small conversation, and beside `compare`."""
        how = {"add_generation_prompt": True, "continue_final_message": False}
        job = {"messages": _SMALL, "tools": None, "variables": variables, **how}
        return self._render(self._reading, template, job)

    def render(
        self,
        template: str,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
    ) -> dict[str, Any]:
        """See `sandboxed.render`."""
        job = {
            "messages": messages,
            "tools": tools,
            "variables": variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        return self._render(self._rendering, template, job)

    def _render(
        self, places: threading.BoundedSemaphore, template: str, job: dict[str, Any]
    ) -> dict[str, Any]:
        job |= {"kind": "template", "template": template}
        key = hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()
        self._check_patience(key)
        with places:
            worker = self._kept_worker(key) or self._worker()
            try:
                answer = self._ask(worker, job, TEMPLATE)
            except BaseException:
                worker.close()
                raise
            self._keep(key, worker)
        return answer

    def close(self) -> None:
        """End the processes; none starts any more."""
        with self._mutex:
            self._closed = True
            if self._process is not None:
                self._process.end()
                self._process = None
            self._forget()

    def _forget(self) -> None:
        while self._kept:
            self._kept.popitem()[1].close()

    def _check_patience(self, key: str) -> None:
        if not _may_wait.get():
            raise WouldWait(key)

    def _kept_worker(self, key: str) -> "_Worker | None":
        with self._mutex:
            worker = self._kept.pop(key, None)
        if worker is None or worker.waits:
            return worker
        # Something else than a job ended it: memory that ran out, or the end of its process.
        worker.close()
        return None

    def _worker(self) -> "_Worker":
        with self._mutex:
            if self._closed:
                raise SandboxUnavailable("the server stops")
            if self._process is None or not self._process.runs:
                self._forget()
                self._process = _Process(self._base())
            try:
                return _Worker(self._process, self._process.fork())
            except OSError as error:
                self._process.end()
                self._process = None
                raise SandboxUnavailable(str(error)) from error

    def _ask(
        self, worker: "_Worker", job: dict[str, Any], limits: Limits, data: bytes | None = None
    ) -> dict[str, Any]:
        job |= {
            "cpu_seconds": limits.cpu_seconds,
            "wall_seconds": limits.wall_seconds,
            "memory": limits.memory,
        }
        link, began = worker.link, time.monotonic()
        # The worker's own clock ends it; this one is for a worker that has none any more.
        link.settimeout(limits.wall_seconds + 5)
        try:
            sandboxed.send(link, json.dumps(job).encode())
            if data is not None:
                sandboxed.send(link, data)
            answer = sandboxed.receive(link, _MOST_ANSWER)
        except OSError:
            answer = b""
        if not answer:
            if time.monotonic() - began >= limits.wall_seconds:
                # Computing alone would have ended sooner: what was brought is not to blame.
                raise SandboxUnavailable("the machine is too busy")
            if worker.process.ends(_END_SECONDS):
                raise SandboxUnavailable("its process has ended")
            raise Exceeded(str(limits))
        found: dict[str, Any] = json.loads(answer)
        if "exceeded" in found:
            raise Exceeded(found["exceeded"] or f"{limits.memory >> 20} MiB of memory")
        return found

    def _keep(self, key: str, worker: "_Worker") -> None:
        with self._mutex:
            if key in self._kept:
                self._kept.pop(key).close()
            self._kept[key] = worker
            while len(self._kept) > (0 if self._closed else _KEPT):
                self._kept.popitem(last=False)[1].close()


class _Process:
    """The process that workers are forked from. It ends when its socket here is closed, by this
    process or by its end."""

    def __init__(self, base: str) -> None:
        """Raises SandboxUnavailable."""
        ours, its = socket.socketpair()
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        with ExitStack() as failed:
            failed.callback(ours.close)
            try:
                with its:
                    process = subprocess.Popen(
                        [sys.executable, "-I", str(Path(sandboxed.__file__))],
                        stdin=its.fileno(),
                        stdout=subprocess.DEVNULL,
                        env=_ENVIRONMENT | passed_on,
                        cwd="/",
                    )
                failed.callback(process.wait)
                failed.callback(process.kill)
                ours.settimeout(START_SECONDS)
                sandboxed.send(ours, base.encode())
                if sandboxed.receive(ours, _MOST_ANSWER) != b"ready":
                    raise SandboxUnavailable("its process does not start")
            except OSError as error:
                raise SandboxUnavailable(str(error)) from error
            failed.pop_all()
        self._process = process
        self._socket = ours

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def ends(self, seconds: float) -> bool:
        """Whether it has ended, or does within these seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.runs

    def fork(self) -> socket.socket:
        """The socket of a new worker. Raises OSError."""
        ours, its = socket.socketpair()
        try:
            with its:
                socket.send_fds(self._socket, [b"1"], [its.fileno()])
        except OSError:
            ours.close()
            raise
        return ours

    def end(self) -> None:
        self._socket.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, slots=True)
class _Worker:
    process: _Process
    """That it was forked from, and ends with."""
    link: socket.socket

    @property
    def waits(self) -> bool:
        """Whether it is there for a further job."""
        try:
            self.link.setblocking(False)
            self.link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self.process.runs
        except OSError:
            return False
        # It says nothing unasked: this is its end.
        return False

    def close(self) -> None:
        self.link.close()
