"""A server whose model hangs or ends: what runs hears of it, and the process ends with status 1."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import save_model
from tests.api.test_generation_lifecycle import events
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.served import address_of

ENGINE = Settings().engine
HANG_SECONDS = 3
ENDLESS = {
    "model": "tiny",
    "prompt": "A",
    "ignore_eos": True,
    "max_tokens": 30_000,
    "stream": True,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=32_768)


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    process: "subprocess.Popen[bytes]"
    url: str
    log: Path
    what: Path
    """What our own engine's model is to do from now on."""

    def fail(self, how: str) -> None:
        """Let the model hang or die. vLLM's process is stopped, or killed."""
        if ENGINE == "native":
            self.what.write_text(how)
            return
        core = next(each for each in self.children if "EngineCore" in each.name())
        core.suspend() if how == "hangs" else core.kill()

    @property
    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    def start() -> Served:
        log, what = tmp_path / "log", tmp_path / "what"
        command = [sys.executable, "-m", "tests.failing_server", str(what)]
        command += ["serve", "--port", "0", "--model", str(model_folder)]
        command += ["--served-model-name", "tiny", "--adapters-dir", str(tmp_path / "store")]
        command += ["--max-batch-rows", "1", "--kv-cache-tokens", "65536"]
        command += ["--hang-timeout", str(HANG_SECONDS)]
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        servers.callback(server.wait)
        servers.callback(server.kill)
        return Served(server, address_of(server, log), log, what)

    with ExitStack() as servers:
        yield start


@pytest.mark.fault(
    "process",
    "The model hangs in a step",
    by="a forward that never returns; on vLLM SIGSTOP of its process",
    promise="After `--hang-timeout` streams end with `engine_dead`, and the server ends with "
    "status 1 and leaves no process.",
    case="hangs",
)
@pytest.mark.fault(
    "process",
    "The model loses its device, or its process dies",
    by="a forward that raises what CUDA does; on vLLM SIGKILL of its process",
    promise="Streams end with `engine_dead`, and the server ends with status 1 and leaves no "
    "process.",
    case="dies",
)
@pytest.mark.parametrize("how", ["hangs", "dies"])
def test_where_the_model_fails_streams_say_so_and_the_server_ends_with_status_1(
    start: Callable[[], Served], how: str
) -> None:
    server = start()
    children = server.children

    with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=ENDLESS, timeout=60) as answer:
        chunks = events(answer)
        next(chunks)
        server.fail(how)
        *_, last = chunks

    assert last["error"]["code"] == "engine_dead"
    assert server.process.wait(60) == 1
    assert "and so does the server, with status 1" in server.log.read_text()
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.fault(
    "process",
    "The model hangs while requests wait for their whole answer",
    by="a forward that never returns; on vLLM SIGSTOP of its process",
    promise="They are answered 503 `engine_dead`.",
)
def test_a_request_that_waits_for_a_model_that_hangs_is_answered(
    start: Callable[[], Served],
) -> None:
    server = start()
    server.fail("hangs")

    answer = httpx.post(f"{server.url}{COMPLETIONS}", json=ENDLESS | {"stream": False}, timeout=60)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert server.process.wait(60) == 1


@pytest.mark.fault(
    "process",
    "The server's process stands still for longer than `--hang-timeout`",
    by="SIGSTOP, then SIGCONT",
    promise="It is no hang: streams go on.",
)
def test_a_server_that_is_stopped_for_longer_and_goes_on_has_not_hung(
    start: Callable[[], Served],
) -> None:
    server = start()

    with httpx.stream("POST", f"{server.url}{COMPLETIONS}", json=ENDLESS, timeout=60) as answer:
        chunks = events(answer)
        next(chunks)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(HANG_SECONDS + 2)
        server.process.send_signal(signal.SIGCONT)
        assert [next(chunks) for _ in range(10)]
    alive = httpx.get(f"{server.url}/health/live", timeout=60)

    assert alive.status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert eventually(lambda: "hangs" not in server.log.read_text())
