"""The server as a user runs it, in a process of its own, asked over HTTP."""

import asyncio
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx
import psutil

from benchmarks.workload import Workload

_STARTUP_SECONDS = 300
_WINDOW = 1024
"""Tokens of the longest row that the server plans for."""


@dataclass(frozen=True, slots=True)
class Round:
    seconds: float
    """From the first request sent to the last answer read."""
    texts: list[str]


def _plan(workload: Workload) -> int:
    """Tokens of cache: twice what the rows need at once, so that the plan is close to the use."""
    row = len(workload.prompts[0]) + workload.tokens_out
    return max(2 * _WINDOW, 2 * len(workload.prompts) * row)


class ServerProcess:
    """`infuse serve` on a free port, until the block ends."""

    def __init__(self, log: Path, *flags: object) -> None:
        self._log = log.open("w+")
        command = [Path(sys.executable).with_name("infuse"), "serve", "--port", "0", *flags]
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [str(part) for part in command], stdout=self._log, stderr=subprocess.STDOUT
        )
        self.url = ""
        self.start_seconds = 0.0
        """From the command to the first moment that it answers."""

    def __enter__(self) -> Self:
        while not (address := re.search(r"answers on (http://\S+)", self._output())):
            late = time.perf_counter() - self._started > _STARTUP_SECONDS
            if self._process.poll() is not None or late:
                raise RuntimeError(f"the server did not start:\n{self._output()}")
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - self._started
        self.url = address[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)
        self._log.close()

    def _output(self) -> str:
        return Path(self._log.name).read_text()


class InfuseServer(ServerProcess):
    """A server with a workload."""

    def __init__(self, workload: Workload, model: Path, folder: Path, *flags: str) -> None:
        self._workload = workload
        super().__init__(
            folder / "server.log",
            *("--model", model, "--served-model-name", "base"),
            *("--kv-cache-tokens", _plan(workload), "--max-model-len", _WINDOW),
            *("--adapters-dir", folder / "store", "--preload-adapters", workload.adapters_folder),
            *flags,
        )

    def run(self, models: list[str]) -> Round:
        """All rows at once, row i on `models[i]`."""
        return asyncio.run(self._run(models))

    async def _run(self, models: list[str]) -> Round:
        limits = httpx.Limits(max_connections=len(models))
        async with httpx.AsyncClient(base_url=self.url, timeout=600, limits=limits) as client:
            started = time.perf_counter()
            texts = await asyncio.gather(
                *(
                    self._complete(client, model, prompt)
                    for model, prompt in zip(models, self._workload.prompts, strict=True)
                )
            )
            return Round(time.perf_counter() - started, list(texts))

    async def _complete(self, client: httpx.AsyncClient, model: str, prompt: list[int]) -> str:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": self._workload.tokens_out,
            "temperature": 0,
            "ignore_eos": True,
        }
        response = await client.post("/v1/completions", json=body)
        response.raise_for_status()
        answer = response.json()
        assert answer["usage"]["completion_tokens"] == self._workload.tokens_out
        return str(answer["choices"][0]["text"])

    def memory(self) -> dict[str, int]:
        """Bytes: the plan by part, and the most that the process ever held in memory."""
        lines = httpx.get(f"{self.url}/metrics").text
        plan = re.findall(r'infuse_memory_bytes\{part="(\w+)"\} (\S+)', lines)
        process = psutil.Process(self._process.pid)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert peak is not None
        return {part: int(float(size)) for part, size in plan} | {"peak": int(peak[1]) * 1024}
