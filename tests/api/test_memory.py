"""A server process that gets no more memory or open files, or is killed for its memory."""

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

import httpx
import psutil
import pytest

from tests.api.conftest import save_model
from tests.api.oracle import upload
from tests.api.stores import ALL_USAGE, text_of
from tests.api.test_streaming import COMPLETIONS
from tests.served import address_of

pytestmark = pytest.mark.native
MEBIBYTE = 1 << 20
COMMAND = "from infuse.server.cli import main; main()"
CLIENTS = 8
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Served:
    process: "subprocess.Popen[bytes]"
    client: httpx.Client

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

    @property
    def has_retried(self) -> bool:
        """Whether a step has failed and run again in parts."""
        metrics = self.client.get("/metrics").text
        return "infuse_step_retries_total 0.0" not in metrics

    def ask_all(self, tokens: int) -> list[httpx.Response]:
        """The answers to prompts of so many tokens, at once."""

        def ask(number: int) -> httpx.Response:
            body = {"model": "tiny", "prompt": [5 + number] * tokens, "max_tokens": 8}
            return self.client.post(COMPLETIONS, json=body | {"ignore_eos": True})

        with ThreadPoolExecutor(CLIENTS) as threads:
            return list(threads.map(ask, range(CLIENTS)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder / "tiny", max_position_embeddings=32_768)


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    """Start a server; each of a test has the same folder of adapters."""

    def start() -> Served:
        log = tmp_path / "log"
        arguments = ["serve", "--port", "0", "--model", model, "--served-model-name", "tiny"]
        arguments += ["--adapters-dir", tmp_path / "adapters", "--kv-cache-tokens", 65_536]
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        with log.open("w") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        opened.callback(process.wait)
        opened.callback(process.kill)
        client = httpx.Client(base_url=address_of(process, log), timeout=120)
        return Served(process, opened.enter_context(client))

    with ExitStack() as opened:
        yield start


@pytest.fixture
def server(start: Callable[[], Served], adapter_folders: dict[str, Path]) -> Served:
    """With an adapter, and a thread for each client."""
    server = start()
    assert upload(server.client, "mine", adapter_folders["mlp"]).status_code == 201
    assert {answer.status_code for answer in server.ask_all(600)} == {200}
    return server


@pytest.mark.fault(
    "memory",
    "The process may open no more files",
    by="`RLIMIT_NOFILE` of the server's process",
    promise="Connections that are open are answered; new ones are, once others have been closed.",
)
def test_a_server_without_open_files_left_answers_new_connections_later(server: Served) -> None:
    text = text_of(server.client, "mine")
    files = psutil.Process(server.process.pid).num_fds()
    with server.limited(resource.RLIMIT_NOFILE, files + 8), ExitStack() as opened:
        for _ in range(40):
            client = opened.enter_context(httpx.Client(base_url=server.client.base_url, timeout=2))
            with suppress(httpx.TransportError):
                client.get("/health/live")
        assert text_of(server.client, "mine") == text
    with httpx.Client(base_url=server.client.base_url, timeout=60) as client:
        assert text_of(client, "mine") == text


@pytest.mark.fault(
    "memory",
    "The process may open no more files for what a request brings",
    by="`RLIMIT_NOFILE` of the server's process",
    promise="The request is answered 503 `no_memory`, and those like it as before, once others "
    "have been closed.",
)
def test_a_grammar_for_which_no_file_can_be_opened_is_asked_again_later(server: Served) -> None:
    body = {"model": "mine", "prompt": "A", "structured_outputs": {"regex": "[ab]{3}"}}
    text_of(server.client, "mine")
    files = psutil.Process(server.process.pid).num_fds()
    with server.limited(resource.RLIMIT_NOFILE, files + 1):
        refused = server.client.post(COMPLETIONS, json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_memory")
    assert server.client.post(COMPLETIONS, json=body).status_code == 200


@pytest.mark.fault(
    "memory",
    "The process gets no more memory while requests run",
    by="`RLIMIT_AS` of the server's process",
    promise="Steps run again in parts. Each request is answered, with its text or with the reason. "
    "With memory again the server answers as before; or it has ended, with status 1 or, where "
    "oneDNN itself cannot go on, by `SIGSEGV`, and the next one does.",
)
def test_requests_that_find_no_memory_say_so_and_the_server_or_the_next_one_answers(
    start: Callable[[], Served], server: Served
) -> None:
    text = text_of(server.client, "mine")
    has = psutil.Process(server.process.pid).memory_info().vms
    answers: list[httpx.Response] = []
    with server.limited(resource.RLIMIT_AS, has + MEBIBYTE), suppress(httpx.TransportError):
        while all(answer.status_code == 200 for answer in answers) and not server.has_retried:
            answers += server.ask_all(3000 + 500 * len(answers))

    for answer in answers:
        assert answer.status_code == 200 or "memory" in answer.json()["error"]["message"]
    try:
        after = text_of(server.client, "mine")
    except httpx.TransportError:
        assert server.process.wait(60) in (1, -signal.SIGSEGV)
        after = text_of(start().client, "mine")
    assert after == text


@contextmanager
def no_more_memory(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Within: a control group kills the process when it takes a few MiB more."""
    version_1 = CGROUPS / "memory"
    group = (version_1 if version_1.is_dir() else CGROUPS) / f"infuse-{process.pid}"
    limit = "memory.limit_in_bytes" if version_1.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(4 * MEBIBYTE))
        (group / "cgroup.procs").write_text(str(process.pid))
    except OSError as error:
        pytest.skip(f"no control group for memory: {error}")
    try:
        yield
    finally:
        process.wait()
        os.rmdir(group)


@pytest.mark.fault(
    "memory",
    "The kernel kills the server, as its container's memory is used up",
    by="the limit of a memory control group",
    promise="The next start serves every adapter as before, and usage has what was answered.",
)
def test_a_server_that_was_killed_for_its_memory_starts_again_with_everything(
    start: Callable[[], Served], adapter_folders: dict[str, Path]
) -> None:
    server = start()
    upload(server.client, "killed", adapter_folders["mlp"])
    text = text_of(server.client, "killed")
    with no_more_memory(server.process), suppress(httpx.TransportError):
        while True:
            server.ask_all(3000)
    assert server.process.wait() == -signal.SIGKILL

    again = start()
    assert text_of(again.client, "killed") == text
    query = ALL_USAGE | {"adapter": "killed"}
    [row] = again.client.get("/v1/usage", params=query).json()["data"]
    assert row["requests"] == 2
