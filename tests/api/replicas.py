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

from tests.api import replica_starter
from tests.releases import REPOSITORY

_STARTUP_SECONDS = 120


@dataclass(frozen=True)
class Release:
    """What servers run."""

    code: Path
    own: tuple[str, ...] = ("merges", "adapters-cache", "usage")
    """The folders that each server has for itself."""


PRESENT = Release(REPOSITORY)


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

    def __init__(
        self, folder: Path, flags: Sequence[str], release: Release, starter: IO[str], pids: IO[str]
    ) -> None:
        self.folder = folder
        self._flags = flags
        self._release = release
        self._starter = starter
        self._pids = pids
        self._logs = itertools.count()
        self.all: list[Replica] = []
        self.replaced: list[Replica] = []
        """Killed and stopped ones. Who has chosen one of them still asks it."""

    @property
    def alive(self) -> list[Replica]:
        return [replica for replica in self.all if not replica.is_killed]

    def replace(self, killed: Replica) -> None:
        """Start a server with the folders of one that was killed."""
        self._wait_for_end(killed)
        self.wait_for(*self.begin(self.all.index(killed)), killed)

    def stop(self, replica: Replica) -> None:
        """Have a server drain and end."""
        os.kill(replica.pid, signal.SIGTERM)
        self._wait_for_end(replica)
        self.all.remove(replica)

    def _wait_for_end(self, replica: Replica) -> None:
        self.replaced.append(replica)
        wait_for_end(psutil.Process(replica.pid))

    def begin(self, number: int) -> tuple[int, Path]:
        """Start a server with the folders of this number; return its process and its log."""
        log = self.folder / f"log{number}-{self._release.code.name}-{next(self._logs)}"
        own = [f"--{kind}-dir={self.folder / kind}{number}" for kind in self._release.own]
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
            assert not log.exists() or replica_starter.ENDED not in log.read_text(), log.read_text()
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
def replicas(
    folder: Path, count: int, flags: Sequence[str], release: Release = PRESENT
) -> Iterator[Replicas]:
    """Within: so many servers run; all that are alive are killed afterwards."""
    starter = subprocess.Popen(
        # The release may have another one; -P: its code is imported, and nothing from beside this.
        [sys.executable, "-P", replica_starter.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=release.code,
        env=os.environ | {"PYTHONPATH": str(release.code)},
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    with starter:
        servers = Replicas(folder, flags, release, starter.stdin, starter.stdout)
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
