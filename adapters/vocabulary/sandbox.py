"""Runs uploaded tokenizers and chat templates in processes with limits of time and memory.

They are not trusted, so none of them runs in the server's process. The first job starts one process
(`sandboxed`), which holds the base's tokenizer and forks a worker for each tokenizer and each chat
template. A template's worker is kept for the next conversation.
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

from infuse.adapters.errors import SandboxUnavailable
from infuse.adapters.vocabulary import sandboxed

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""One thread for each library: only a process with a single thread forks safely."""
_PASSED_ON = ("LD_LIBRARY_PATH", "TZ")
START_SECONDS = 120.0
_END_SECONDS = 0.2
"""How long to wait for a process to end after its worker: one that ends with it may be first."""
_MOST_ANSWER_BYTES = 64 << 20
_KEPT = 8
"""How many idle workers are kept, each for its template's next conversation."""
_RENDERING = 4
"""How many workers render conversations of requests at once."""
_READING = 2
"""How many workers read what adapters bring at once. They are counted apart, so that uploads delay
no conversation."""
_TRIAL: Sequence[Mapping[str, Any]] = ({"role": "user", "content": "Hello"},)
"""The conversation that a new template is tried on."""
_may_wait: ContextVar[bool] = ContextVar("may_wait", default=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """The most that one job may use."""

    cpu_seconds: float
    wall_seconds: float
    """Ends a job that a busy machine gives too little processor time."""
    memory: int
    """Bytes of address space, beyond those of the process that the worker is forked from."""

    def __str__(self) -> str:
        seconds = f"{self.cpu_seconds:g} seconds of CPU time, {self.wall_seconds:g} seconds in all"
        return f"{seconds}, or {self.memory >> 20} MiB of memory"


TOKENIZER = Limits(cpu_seconds=20, wall_seconds=60, memory=2 << 30)
TEMPLATE = Limits(cpu_seconds=2, wall_seconds=10, memory=512 << 20)


class Exceeded(Exception):
    """A job went beyond a limit. The message names it and completes 'takes more than …'."""


class WouldWait(Exception):
    """A job was not begun, since it would wait for a limited process. `key` names its tokenizer or
    its template."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within this context, jobs that this thread gives to a sandbox raise WouldWait at once."""
    token = _may_wait.set(False)
    try:
        yield
    finally:
        _may_wait.reset(token)


class Sandbox:
    """Runs jobs on uploaded tokenizers and chat templates in limited processes. Thread-safe.

    The first job starts the process. Jobs raise Exceeded, WouldWait, and SandboxUnavailable if no
    process can be started or the machine is too busy.
    """

    def __init__(self, base: Callable[[], str]) -> None:
        """`base` returns the base's tokenizer as JSON. It is called when the process starts."""
        self._base = base
        self._mutex = threading.Lock()
        self._rendering = threading.BoundedSemaphore(_RENDERING)
        self._reading = threading.BoundedSemaphore(_READING)
        self._closed = False
        self._process: _Process | None = None
        self._kept: OrderedDict[str, _Worker] = OrderedDict()
        """Digest of a template -> a worker that has compiled it, least recently used first."""

    def compare(self, tokenizer: bytes, key: str) -> dict[str, Any]:
        """Compare a tokenizer with the base's: see `sandboxed.compare`. WouldWait names `key`."""
        self._check_may_wait(key)
        with self._reading, closing(self._worker()) as worker:
            return self._ask(worker, {"kind": "tokenizer"}, TOKENIZER, tokenizer)

    def try_template(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Render a small conversation. It counts as reading an upload, so it delays no request."""
        how = {"add_generation_prompt": True, "continue_final_message": False}
        job = {"messages": _TRIAL, "tools": None, "variables": variables, **how}
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
        """Render a conversation with a chat template, as `sandboxed.render` does."""
        job = {
            "messages": messages,
            "tools": tools,
            "variables": variables,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        return self._render(self._rendering, template, job)

    def _render(
        self, semaphore: threading.BoundedSemaphore, template: str, job: dict[str, Any]
    ) -> dict[str, Any]:
        job |= {"kind": "template", "template": template}
        key = hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()
        self._check_may_wait(key)
        with semaphore:
            worker = self._kept_worker(key) or self._worker()
            try:
                answer = self._ask(worker, job, TEMPLATE)
            except BaseException:
                worker.close()
                raise
            self._keep(key, worker)
        return answer

    def close(self) -> None:
        """End all processes. Later jobs raise SandboxUnavailable."""
        with self._mutex:
            self._closed = True
            if self._process is not None:
                self._process.end()
                self._process = None
            self._forget()

    def _forget(self) -> None:
        while self._kept:
            self._kept.popitem()[1].close()

    def _check_may_wait(self, key: str) -> None:
        if not _may_wait.get():
            raise WouldWait(key)

    def _kept_worker(self, key: str) -> "_Worker | None":
        with self._mutex:
            worker = self._kept.pop(key, None)
        if worker is None or worker.is_idle:
            return worker
        # It ended while it was idle: the machine ran out of memory, or its process ended.
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
        # The worker's own timer ends it before; this one is for a worker whose timer does not fire.
        link.settimeout(limits.wall_seconds + 5)
        try:
            sandboxed.send(link, json.dumps(job).encode())
            if data is not None:
                sandboxed.send(link, data)
            answer = sandboxed.receive(link, _MOST_ANSWER_BYTES)
        except OSError:
            answer = b""
        if not answer:
            if time.monotonic() - began >= limits.wall_seconds:
                # A runaway would have met its limit of CPU time before: the job is not to blame.
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
    """The process that workers are forked from. It ends when the server closes its socket, or ends
    itself."""

    def __init__(self, base: str) -> None:
        """Start the process. `base` is the base's tokenizer as JSON. Raises SandboxUnavailable."""
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
                if sandboxed.receive(ours, _MOST_ANSWER_BYTES) != b"ready":
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
        """Whether it has ended, or ends within this time."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.runs

    def fork(self) -> socket.socket:
        """Fork a worker, and return the socket that leads to it. Raises OSError."""
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
    """The process that the worker was forked from. The worker ends with it."""
    link: socket.socket

    @property
    def is_idle(self) -> bool:
        """Whether it still runs and can take another job. Call it between jobs only."""
        try:
            self.link.setblocking(False)
            self.link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self.process.runs
        except OSError:
            return False
        # A worker sends nothing unasked, so this is the end of its socket: it has ended.
        return False

    def close(self) -> None:
        self.link.close()
