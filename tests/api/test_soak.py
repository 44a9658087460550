"""Twice the load that a server can serve, for half a minute or an hour: nothing goes wrong."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from transformers import AutoModelForCausalLM

from tests.api.archives import CONFIG, WEIGHTS
from tests.api.conftest import ADAPTERS as CONFIGS
from tests.api.soak import TENANTS, Soak, write_keys
from tests.api.soak_book import TEMPLATE, Book
from tests.api.soak_page import PAGE, Told, page_of
from tests.api.soak_watch import Watch
from tests.factories import CHAT_TEMPLATE, save_adapter
from tests.served import address_of
from tests.test_listener import INFUSE

FAULT = re.compile(r"Traceback|\bERROR\b|\bCRITICAL\b|not in the OpenAPI")
MEASURED_SECONDS = 5
FEW_BYTES = 200_000_000
"""By so much the memory may grow after the warm-up. Allocators keep some of what they had, and a
limited process, which may start at any time, has 60 MB."""
SETTINGS = {
    "served-model-name": "tiny",
    "port": "0",
    "max-batch-rows": "8",
    "max-queue": "32",
    "max-queue-seconds": "30",
    "max-resident-adapters": "6",
    "max-host-adapter-bytes": "65536",
    "kv-cache-tokens": "2048",
    "max-upload-bytes": "1048576",
}
"""Little of everything, so that all of it runs out."""


@pytest.fixture(scope="module")
def kinds(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters, the last of which brings a chat template of its own."""
    base, root = (
        AutoModelForCausalLM.from_pretrained(model_folder),
        tmp_path_factory.mktemp("kinds"),
    )
    kinds = {}
    for seed, (name, config) in enumerate([*CONFIGS.items(), ("own", {})], start=1):
        saved = save_adapter(base, root / "saved" / name, seed=seed, **config)
        kinds[name] = root / name
        kinds[name].mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.copy(saved / file, kinds[name])
    (kinds["own"] / TEMPLATE).write_text(CHAT_TEMPLATE.replace("<s>", "<s>Be kind."))
    return kinds


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    process: "subprocess.Popen[bytes]"
    url: str
    folder: Path
    log: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def temporary(self) -> Path:
        return self.folder / "temporary"


@pytest.fixture
def served(model_folder: Path, tmp_path: Path) -> Iterator[Served]:
    log, temporary = tmp_path / "log", tmp_path / "temporary"
    temporary.mkdir()
    command = [INFUSE, "serve", f"--model={model_folder}"]
    command += [f"--{name}={value}" for name, value in SETTINGS.items()]
    command += [f"--adapters-dir={tmp_path / 'store'}"]
    command += [f"--keys-file={write_keys(tmp_path / 'keys.json')}"]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            # vLLM's sockets bear no long path.
            env=os.environ | {"TMPDIR": str(temporary), "VLLM_RPC_BASE_PATH": "/tmp"},
            start_new_session=True,
        )
    try:
        yield Served(process, address_of(process, log), tmp_path, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("seconds", "warm_up", "every"),
    [
        (30, 10, 0.5),
        pytest.param(3600, 600, 5, marks=[pytest.mark.full, pytest.mark.timeout(2 * 3600)]),
    ],
)
def test_a_server_under_twice_its_load_answers_right_and_holds_no_more_with_time(
    served: Served,
    model_folder: Path,
    kinds: dict[str, Path],
    seconds: float,
    warm_up: float,
    every: float,
) -> None:
    book = Book(model_folder, kinds)
    watch = Watch(served.process.pid, served.store, served.temporary)
    soak = Soak(served.url, httpx.get(f"{served.url}/openapi.json").json(), book)
    told = asyncio.run(run(soak, watch, seconds, warm_up, every))
    print(page := page_of(told))
    children = watch.server.children(recursive=True)
    served.process.terminate()

    assert served.process.wait(60) == 0
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert left_behind(served) == []
    assert faults_in(served.log) == []
    assert soak.strays == []
    assert book.wrong() == []
    assert book.answers > 5 * seconds
    assert all(soak.asked[tenant]["429"] for tenant in TENANTS)
    if seconds > 60:
        PAGE.write_text(page)
        assert told.growing == []
    assert told.trends["memory"].grown < FEW_BYTES


async def run(soak: Soak, watch: Watch, seconds: float, warm_up: float, every: float) -> Told:
    """Send twice what the server can serve, for so long; then wait until it holds nothing."""
    try:
        await soak.prepare()
        rate = await soak.rate(MEASURED_SECONDS)
        start, server, client = watch.look(), watch.processor_seconds, time.process_time()
        with watch.every(every):
            await soak.run(rate, seconds)
            server, client = watch.processor_seconds - server, time.process_time() - client
        warm = [each for each in watch.samples if each.seconds > start.seconds + warm_up]
        await soak.tidy()
        held = await soak.held()
    finally:
        await soak.close()
    assert held == {}
    return Told(soak, start, warm, watch.look(), server, client)


def left_behind(served: Served) -> list[str]:
    """Files that are there though no adapter, no merge and no process is. What torch compiles for
    vLLM it keeps in the temporary folder."""
    kept = {"lock", "journal.jsonl", "usage.sqlite3"}
    folders = (served.store, served.temporary)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    left = [str(path) for path in files if path.name not in kept]
    return [path for path in left if "/torchinductor_" not in path]


def faults_in(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if FAULT.search(line)]
