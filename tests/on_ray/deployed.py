"""Replicas of `infuse deploy` behind one address, some of which are killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil

from tests.served import address_of

_STARTUP_SECONDS = 240
_COMMAND = "from infuse.server.cli import main; main()"
_RUNNING = re.compile(r'^infuse_requests_running\{replica="(.*)"\}', re.MULTILINE)


class Copy:
    """A replica, and a client of them all: which one answers is for the router to say."""

    def __init__(self, pid: int, deployment: "Deployment") -> None:
        self.pid = pid
        self.client = deployment.client
        self._deployment = deployment
        self.is_killed = False

    def kill(self) -> None:
        self.is_killed = True
        self._deployment.last_kill = time.monotonic()
        os.kill(self.pid, signal.SIGKILL)

    def may_fail(self, begun: float) -> bool:
        """Whether a request that began then may have been on a replica that was killed."""
        return self._deployment.last_kill >= begun


class Deployment:
    """`infuse deploy` in a process of its own."""

    def __init__(self, process: psutil.Process, url: str, count: int) -> None:
        self.url = url
        self.client = httpx.Client(base_url=url, timeout=60, event_hooks={"response": [_whole]})
        self.last_kill = 0.0
        self._process = process
        self._count = count
        self.alive = [Copy(pid, self) for pid in self._pids()]

    @property
    def running(self) -> set[str]:
        """The replicas that answer."""
        return set(_RUNNING.findall(self.client.get("/metrics").text))

    def replace(self, killed: Copy) -> None:
        """Wait until Serve has started another replica."""
        deadline = time.monotonic() + _STARTUP_SECONDS
        while len(self._pids() - {killed.pid}) < self._count or len(self.running) < self._count:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.alive = [Copy(pid, self) for pid in self._pids()]

    def _pids(self) -> set[int]:
        return {each.pid for each in _processes(self._process) if _is_replica(each)}


def _whole(answer: httpx.Response) -> None:
    """Serve's proxy has no answer of ours for a request whose replica died."""
    if answer.status_code == 500 and answer.headers["Content-Type"].startswith("text/plain"):
        raise httpx.RemoteProtocolError("the replica has gone")


def _is_replica(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "ServeReplica" in process.name()
    return False


def _processes(root: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return root.children(recursive=True)
    return []


@contextmanager
def deployed(folder: Path, count: int, flags: Sequence[str]) -> Iterator[Deployment]:
    """Within: so many replicas run; all that Ray has started has ended afterwards."""
    own = [f"--{kind}-dir={folder / kind}" for kind in ("merges", "adapters-cache", "usage")]
    arguments = ["deploy", "--port=0", f"--replicas={count}", *own, *flags]
    log = folder / "log"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("w") as output:
        started = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
    process = psutil.Process(started.pid)
    try:
        deployment = Deployment(process, address_of(started, log), count)
        with deployment.client:
            yield deployment
    finally:
        others = _processes(process)
        started.terminate()
        try:
            assert started.wait(60) == 0, log.read_text()
        finally:
            _, left = psutil.wait_procs(others, timeout=60)
            for each in [*left, *([process] if started.poll() is None else [])]:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
    assert not left
