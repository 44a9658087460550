"""A server whose machine's clock is set forward or back by a day while it runs."""

import glob
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from infuse.server.cli import app
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, text_of
from tests.api.test_generation_lifecycle import LONG, events
from tests.api.test_streaming import COMPLETIONS
from tests.served import address_of

LIBRARIES = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
COMMAND = "from infuse.server.cli import main; main()"
DAY = 24 * 3600


@dataclass(frozen=True)
class Served:
    process: "subprocess.Popen[bytes]"
    client: httpx.Client
    clock: Path
    """What the server's clock shows, as a difference to the true time."""

    def time(self) -> int:
        """By the server's clock."""
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        return int(self.client.post(COMPLETIONS, json=body).json()["created"])


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Callable[[], Served]]:
    clock = tmp_path / "clock"
    clock.write_text("+0")

    def start() -> Served:
        log = tmp_path / "log"
        arguments = ["serve", "--port", "0", "--model", model_folder, "--served-model-name", "tiny"]
        arguments += ["--adapters-dir", tmp_path / "store", "--keep-days", "30"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                # The time since the start, by which a server waits, is not set with the clock.
                env=os.environ
                | {
                    "LD_PRELOAD": LIBRARIES[0],
                    "FAKETIME_TIMESTAMP_FILE": str(clock),
                    "FAKETIME_NO_CACHE": "1",
                    "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                    "NO_FAKE_STAT": "1",
                },
            )
        opened.callback(process.wait)
        opened.callback(process.kill)
        client = httpx.Client(base_url=address_of(process, log), timeout=60)
        return Served(process, opened.enter_context(client), clock)

    with ExitStack() as opened:
        yield start


@pytest.mark.fault(
    "clock",
    "The clock is set forward by a day",
    by="`faketime`",
    promise="Streams, deadlines and the drain go on by the time that has passed. Changes are made, "
    "the audit trail holds, usage is exact, also after a restart.",
    case="+1d",
)
@pytest.mark.fault(
    "clock",
    "The clock is set back by a day",
    by="`faketime`",
    promise="As where it is set forward.",
    case="-1d",
)
@pytest.mark.skipif(not LIBRARIES, reason="needs Debian's package faketime")
@pytest.mark.parametrize("jump", ["+1d", "-1d"])
def test_a_clock_that_is_set_changes_no_answer_loses_no_change_and_miscounts_nothing(
    start: Callable[[], Served],
    adapter_folders: dict[str, Path],
    tmp_path: Path,
    jump: str,
) -> None:
    server = start()
    client = server.client
    upload(client, "mine", adapter_folders["mlp"])
    text = text_of(client, "mine")
    begun = server.time()
    body = LONG | {"model": "mine", "stream": True}
    allowing = {"X-Request-Timeout": "3600"}
    with (
        client.stream("POST", COMPLETIONS, json=body, headers=allowing) as answer,
        closing(events(answer)) as chunks,
    ):
        next(chunks)
        server.clock.write_text(jump)
        *_, last = chunks
    assert last["choices"][0]["finish_reason"] == "length"
    assert abs(server.time() - begun - DAY * int(f"{jump[0]}1")) < 3600
    assert text_of(client, "mine") == text
    assert upload(client, "mine", adapter_folders["queries"], "PUT").json()["revision"] == 2
    path = f"{ADAPTERS}/mine"
    assert client.post(f"{path}/rollback", json={"revision": 1}).json()["revision"] == 3
    assert text_of(client, "mine") == text
    assert client.get("/health/ready").status_code == 200
    server.process.terminate()
    assert server.process.wait(60) == 0

    store = str(tmp_path / "store")
    audit = CliRunner().invoke(app, ["audit", "verify", "--adapters-dir", store])
    assert audit.exit_code == 0, audit.output
    client = start().client
    assert text_of(client, "mine") == text
    revisions = client.get(f"{path}/revisions").json()["data"]
    assert [each["revision"] for each in revisions] == [3, 2, 1]
    query = {"start": iso(time.time() - 3 * DAY), "end": iso(time.time() + 3 * DAY)}
    rows = client.get("/v1/usage", params=query | {"adapter": "mine"}).json()["data"]
    assert sum(each["requests"] for each in rows) == 5


def iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
