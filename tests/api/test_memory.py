"""A server process that gets no more memory, no more open files, or is killed for its memory."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.api.conftest import save_model
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, text_of
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.served import address_of

pytestmark = pytest.mark.native
MEBIBYTE = 1 << 20
COMMAND = "from server.cli import main; main()"
LONG = {"model": "tiny", "prompt": [5] * 6000, "max_tokens": 2, "ignore_eos": True}
CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Served:
    process: "subprocess.Popen[bytes]"
    client: httpx.Client
    log: Path

    @contextmanager
    def limited(self, what: int, limit: int) -> Iterator[None]:
        """Within: the process may have no more than that of a resource."""
        before = resource.prlimit(self.process.pid, what)
        resource.prlimit(self.process.pid, what, (limit, before[1]))
        try:
            yield
        finally:
            if self.process.poll() is None:
                resource.prlimit(self.process.pid, what, before)

    def addresses(self) -> int:
        """Bytes of address space that the process has."""
        return psutil.Process(self.process.pid).memory_info().vms


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=32_768)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Start a server on one folder of adapters."""

    def start() -> Served:
        log = tmp_path / "log"
        arguments = ["serve", "--port", "0", "--model", model, "--served-model-name", "tiny"]
        arguments += ["--adapters-dir", tmp_path / "store", "--kv-cache-tokens", 65_536]
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        opened.callback(process.wait)
        opened.callback(process.kill)
        client = httpx.Client(base_url=address_of(process, log), timeout=60)
        return Served(process, opened.enter_context(client), log)

    with ExitStack() as opened:
        yield start


@pytest.mark.fault(
    "memory",
    "The process gets no more memory while requests run",
    by="`RLIMIT_AS` of the server's process",
    promise="Each request is answered: with its text, or an error with a reason. With memory again, "
    "the server answers as before; or it has ended with status 1, and the next one does.",
)
def test_requests_that_find_no_memory_say_so_and_the_server_goes_on_or_ends_with_status_1(
    start: Callable[[], Served], adapter_folders: dict[str, Path]
) -> None:
    server = start()
    assert upload(server.client, "mine", adapter_folders["mlp"]).status_code == 201
    text = text_of(server.client, "mine")

    def ask(number: int) -> tuple[int, dict[str, Any]]:
        body = LONG | {"prompt": [5 + number] * 6000}
        answer = server.client.post(COMPLETIONS, json=body)
        return answer.status_code, answer.json()

    with (
        server.limited(resource.RLIMIT_AS, server.addresses() + 64 * MEBIBYTE),
        ThreadPoolExecutor(8) as threads,
    ):
        answers = list(threads.map(ask, range(8)))
    print([(status, body.get("error", {}).get("message")) for status, body in answers])
    assert any(status != 200 for status, _ in answers)
    assert 0
    for status, body in answers:
        assert status == 200 or body["error"]["message"]
