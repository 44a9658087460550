"""An engine behind a pipe: the outside of its process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Timer
from typing import Any

from benchmarks.engines import Answer, EngineFailed, Request, Round

ROOT = Path(__file__).parents[2]
"""The checkout that this code is of."""
_START_SECONDS = 900
"""A first start may compile."""
_ROUND_SECONDS = 600


class Worker:
    """A module of `benchmarks.engines` that ends in `lines.serve`, run by a Python of its own.

    `tree`: the checkout whose code it runs.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Mapping[str, Any],
        *,
        log: Path,
        python: Path = Path(sys.executable),
        tree: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._command = [
            str(python),
            *("-m", f"benchmarks.engines.{module}", json.dumps(arguments, default=str)),
        ]
        self._tree = tree
        self._environment = dict(environment or {})
        self.log = log
        self._process: subprocess.Popen[str] | None = None
        self.start_seconds = 0.0
        """From the command to the first moment that it answers."""

    @property
    def group(self) -> int:
        assert self._process is not None, f"{self.name} has not been started"
        return self._process.pid

    def start(self) -> None:
        started = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._tree,
                env=os.environ | {"PYTHONPATH": str(self._tree)} | self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # vLLM's own processes outlive their parent: they end as a group.
                start_new_session=True,
            )
        self._read(_START_SECONDS)
        self.start_seconds = time.perf_counter() - started

    def run(self, requests: Sequence[Request], in_flight: int | None = None) -> Round:
        assert self._process is not None, f"{self.name} has not been started"
        assert self._process.stdin is not None
        asked = {"requests": [asdict(each) for each in requests], "in_flight": in_flight}
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
        except OSError as error:
            raise self._failed() from error
        answer = self._read(_ROUND_SECONDS)
        return Round(
            answer["began"], answer["seconds"], [Answer(**each) for each in answer["answers"]]
        )

    def stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._kill()
        self._process.wait()

    def _kill(self) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        late = Timer(seconds, self._kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if not line:
            raise self._failed()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineFailed(f"{self.name}: {answer['error']}")
        return answer

    def _failed(self) -> EngineFailed:
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:]
        return EngineFailed(f"{self.name} ended: {''.join(last)[:300]}")
