"""Infuse as a user runs it: `infuse serve` in a process of its own, asked over HTTP."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

from benchmarks.engines import EngineFailed, Request, Round
from benchmarks.engines.client import BASE, ask
from benchmarks.engines.worker import ROOT, Worker

_STARTUP_SECONDS = 900
"""A first start on vLLM may compile."""


def _address(log: Path) -> str | None:
    """What a server says of itself; None: nothing yet."""
    found = re.search(r"answers on (http://\S+)", log.read_text())
    return None if found is None else found[1]


class ServerProcess:
    """`infuse serve`, or another command, on a free port, until the block ends. `python`: that of
    its environment."""

    def __init__(
        self,
        log: Path,
        *flags: object,
        command: str = "serve",
        environment: Mapping[str, str] | None = None,
        python: Path = Path(sys.executable),
    ) -> None:
        self._python = python
        self._log = log
        self._command = command
        self._flags = [str(flag) for flag in flags]
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start_seconds = 0.0
        """From the command to the first moment that it answers."""

    @property
    def group(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        # vLLM's environment has not this package's command.
        infuse = "from infuse.server.cli import main; main()"
        command = [str(self._python), "-c", infuse, self._command, "--port", "0", *self._flags]
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | self._environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        while not (url := _address(self._log)):
            late = time.perf_counter() - started > _STARTUP_SECONDS
            if self._process.poll() is not None or late:
                self.stop()
                last = self._log.read_text().strip().splitlines()[-1:]
                raise EngineFailed(f"the server did not start: {''.join(last)}")
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - started
        self.url = url

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(60)
            # vLLM's own processes may outlive the server's.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def memory(self) -> dict[str, int]:
        """Bytes: the plan by part, what the process holds in memory, and the most it ever held."""
        lines = httpx.get(f"{self.url}/metrics").text
        plan = re.findall(r'infuse_memory_bytes\{part="(\w+)"\} (\S+)', lines)
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert peak is not None
        return {part: int(float(size)) for part, size in plan} | {
            "resident": process.memory_info().rss,
            "peak": int(peak[1]) * 1024,
        }


class InfuseHttp(ServerProcess):
    """The server as an engine: what it streams is read token by token."""

    def __init__(self, name: str, log: Path, *flags: object, **how: Any) -> None:
        """`how`: as `ServerProcess` takes it."""
        super().__init__(log, "--served-model-name", BASE, *flags, **how)
        self.name = name

    def run(
        self, requests: Sequence[Request], in_flight: int | None = None, **fields: Any
    ) -> Round:
        """`fields` are added to every request's body."""
        return ask(self.url, requests, in_flight, **fields)


class EitherWay(Worker):
    """A server whose engine can also be asked directly: `run` does that."""

    def over_http(self, requests: Sequence[Request], elsewhere: bool) -> Round:
        url = _address(self.log)
        assert url is not None, "a server that is ready says where"
        return ask(url, requests, elsewhere=elsewhere)
