"""Several servers in processes of their own on one store, some of which are killed."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil

from tests.api.replica_starter import ENDED

_STARTUP_SECONDS = 120
_OWN = ("merges", "adapters-cache", "usage")
"""The folders that each server has for itself."""


@dataclass(eq=False)
class Replica:
    """A server, and a client of it."""

    pid: int
    log: Path
    client: httpx.Client
    is_killed: bool = False

    def kill(self) -> None:
        self.is_killed = True
        os.kill(self.pid, signal.SIGKILL)

    def may_fail(self, _: float) -> bool:
        """Whether a request may have failed because its server was killed."""
        return self.is_killed


class Replicas:
    """Starts servers, each with folders of its own beside the store."""

    def __init__(self, folder: Path, flags: Sequence[str], starter: IO[str], pids: IO[str]):
        self.folder = folder
        self._flags = flags
        self._starter = starter
        self._pids = pids
        self._logs = itertools.count()
        self.all: list[Replica] = []
        self.replaced: list[Replica] = []
        """Killed ones. Who has chosen one of them still asks it."""

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.all if not replica.is_killed]

    def replace(self, killed: Replica) -> None:
        """Start a server with the folders of one that was killed."""
        self.replaced.append(killed)
        wait_for_end(psutil.Process(killed.pid))
        self.wait_for(*self.begin(self.all.index(killed)), killed)

    def begin(self, number: int) -> tuple[int, Path]:
        """Start a server with the folders of this number; return its process and its log."""
        log = self.folder / f"log{number}-{next(self._logs)}"
        own = [f"--{kind}-dir={self.folder / kind}{number}" for kind in _OWN]
        return self.start(log, "serve", "--port=0", *self._flags, *own), log

    def start(self, log: Path, *arguments: str) -> int:
        """Start a command of infuse and return its process."""
        print(json.dumps([str(log), *arguments]), file=self._starter, flush=True)
        return int(self._pids.readline())

    def wait_for(self, pid: int, log: Path, killed: Replica | None = None) -> None:
        """Wait until a server answers; it takes the place of the one that was killed."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        while not (log.exists() and (found := re.search(r"answers on (\S+)", log.read_text()))):
            assert time.monotonic() < deadline, log.read_text()
            assert not log.exists() or ENDED not in log.read_text(), log.read_text()
            time.sleep(0.05)
        replica = Replica(pid, log, httpx.Client(base_url=found[1], timeout=60))
        if killed is None:
            self.all.append(replica)
        else:
            self.all[self.all.index(killed)] = replica


def wait_for_end(process: psutil.Process) -> None:
    """Wait until a killed process holds no lock any more."""
    with suppress(psutil.NoSuchProcess, FileNotFoundError):
        while not _has_ended(process):
            time.sleep(0.01)


def _has_ended(process: psutil.Process) -> bool:
    """Whether it is a zombie and its last thread has gone."""
    is_zombie = process.status() == psutil.STATUS_ZOMBIE
    return is_zombie and len(os.listdir(f"/proc/{process.pid}/task")) == 1


@contextmanager
def replicas(folder: Path, count: int, flags: Sequence[str]) -> Iterator[Replicas]:
    """Within: so many servers run; all that are alive are killed afterwards."""
    starter = subprocess.Popen(
        [sys.executable, "-m", "tests.api.replica_starter"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter:
        servers = Replicas(folder, flags, starter.stdin, starter.stdout)
        try:
            begun = [servers.begin(number) for number in range(count)]
            for pid, log in begun:
                servers.wait_for(pid, log)
            yield servers
        finally:
            for replica in [*servers.replaced, *servers.all]:
                replica.client.close()
            for replica in servers.all:
                with suppress(ProcessLookupError):
                    os.kill(replica.pid, signal.SIGKILL)
            starter.stdin.close()
