"""Hundreds of requests, a third of which go wrong, while adapters change under them."""

import gc
import itertools
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle, upload
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually

REQUESTS = 200
TOKENS = 16
PROMPT = "The order arrived"
MOVING = "moving"
KINDS = ("default", "queries", "mlp")
FLAT_BYTES = 40_000_000
"""The process may grow by this much in a soak: allocators keep some of what they had."""


class Changing:
    """Replaces, deletes and uploads one adapter again, over and over, until told to stop."""

    def __init__(self, client: httpx.Client, folders: dict[str, Path]) -> None:
        self._client = client
        self._folders = folders
        self._done = threading.Event()
        self.kind_of: dict[str, str] = {}
        """`moving@3` -> the folder that it was uploaded from."""
        self.changes = 0

    def run(self) -> None:
        for kind in itertools.cycle(KINDS):
            method = "PUT" if self.changes % 4 else "POST"
            if method == "POST":
                self._client.delete(f"/v1/adapters/{MOVING}")
            answer = upload(self._client, MOVING, self._folders[kind], method)
            assert answer.is_success, answer.text
            self.kind_of[f"{MOVING}@{answer.json()['revision']}"] = kind
            self.changes += 1
            if self._done.wait(0.02):
                return

    def stop(self) -> None:
        self._done.set()


def ask(client: httpx.Client, number: int) -> tuple[str, str] | None:
    """One request; the revision that answered, and its text, where it was meant to succeed."""
    rng = random.Random(number)
    body = {
        "model": rng.choice([MOVING, *KINDS]),
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    fate = number % 6
    if fate == 0:
        refused = rng.choice([{"model": "nobody"}, {"temperature": -1}, {"prompt": "x" * 999}])
        assert client.post(COMPLETIONS, json=body | refused).status_code in (400, 404)
        return None
    if fate == 1:
        leaving = body | {"max_tokens": 200, "stream": True, "n": 2}
        with client.stream("POST", COMPLETIONS, json=leaving) as stream:
            if stream.is_success:
                next(stream.iter_lines())
        return None
    answer = client.post(COMPLETIONS, json=body)
    if answer.status_code == 404:
        assert body["model"] == MOVING
        return None
    assert answer.status_code == 200, answer.text
    return answer.headers["infuse-adapter"], answer.json()["choices"][0]["text"]


def soak(server: RunningServer, folders: dict[str, Path]) -> tuple[Changing, list[tuple[str, str]]]:
    limits = httpx.Limits(max_connections=24)
    with httpx.Client(base_url=server.base_url, timeout=120, limits=limits) as client:
        changing = Changing(client, folders)
        with ThreadPoolExecutor(17) as pool:
            changed = pool.submit(changing.run)
            answers = list(pool.map(lambda number: ask(client, number), range(REQUESTS)))
            changing.stop()
            changed.result()
        client.delete(f"/v1/adapters/{MOVING}")
    return changing, [answer for answer in answers if answer is not None]


@pytest.fixture(scope="module")
def expected(adapter_folders: dict[str, Path], model_folder: Path) -> Callable[[str], str]:
    texts = {}
    for kind in KINDS:
        oracle = Oracle(model_folder, adapter_folders[kind])
        texts[kind] = oracle.text(oracle.greedy(PROMPT, TOKENS))
    return texts.__getitem__


def test_a_soak_leaves_nothing_behind_and_every_answer_is_its_revisions_own(
    server: RunningServer, adapter_folders: dict[str, Path], expected: Callable[[str], str]
) -> None:
    process = psutil.Process()
    soak(server, adapter_folders)
    gc.collect()
    before = process.memory_info().rss
    changing, answers = soak(server, adapter_folders)
    gc.collect()
    grown = process.memory_info().rss - before

    assert eventually(lambda: at_rest(server))
    assert changing.changes > 10
    assert len(answers) >= REQUESTS // 2
    for revision, text in answers:
        kind = changing.kind_of.get(revision, revision.partition("@")[0])
        assert text == expected(kind), revision
    assert grown < FLAT_BYTES
