"""Far more adapters than slots: replaced, deleted, mixed and evicted under requests."""

import copy
import random
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.storage.store import AdapterStore
from tests.api.conftest import ADAPTERS, ServeAdapters
from tests.api.oracle import upload
from tests.api.test_adapters_life import BODY
from tests.api.test_mixtures import pefts_text
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually
from tests.factories import save_adapter

KINDS = 12
"""Adapters of different texts. One has the vectors of its number's, until it is changed."""
ASKING = 12
CHANGED = 40
"""The first so many adapters are replaced and deleted while they are asked for."""
REVISION = re.compile(r"a(\d+)@(\d+)")

Change = tuple[int, int]
"""An adapter's number, and the revision's."""


def name_of(number: int) -> str:
    return f"a{number}"


@pytest.fixture(scope="module")
def kinds(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    root = tmp_path_factory.mktemp("kinds")
    configs = list(ADAPTERS.values())
    return {
        str(kind): save_adapter(base, root / str(kind), seed=kind, **configs[kind % len(configs)])
        for kind in range(KINDS)
    }


def register(folder: Path, kinds: Mapping[str, Path], count: int) -> None:
    """So many adapters whose vectors all differ: those of one kind by rounding errors."""
    kept = [load_file(saved / WEIGHTS_FILE) for saved in kinds.values()]
    store = AdapterStore(folder)
    for number in range(count):
        tensors = copy.deepcopy(kept[number % KINDS])
        bits = next(iter(tensors.values())).view(torch.int32).view(-1)
        for place in range(number.bit_length()):
            bits[place] ^= number >> place & 1
        with store.staging() as staged:
            shutil.copy(kinds[str(number % KINDS)] / CONFIG_FILE, staged)
            save_file(tensors, staged / WEIGHTS_FILE)
            store.create(name_of(number), staged)
    store.close()


class Load:
    """Requests and changes by clients of their own, and what each revision's kind is."""

    def __init__(self, url: str, kinds: Mapping[str, Path], registered: int) -> None:
        self.kinds = kinds
        self.registered = registered
        self.kind_of: dict[Change, int] = {}
        """Of revisions that changes have made."""
        self.answers: list[tuple[str, str]] = []
        """The revisions as the header names them, and the text."""
        self.changes: Counter[str] = Counter()
        limits = httpx.Limits(max_connections=ASKING + 1)
        self.client = httpx.Client(base_url=url, timeout=120, limits=limits)

    def ask(self, seed: int) -> None:
        choose = random.Random(seed)
        # A fifth of the requests is for adapters that are changed.
        mine = [choose.randrange(choose.choice([CHANGED, *[self.registered] * 4])) for _ in "ab"]
        body: dict[str, Any] = BODY | {"model": name_of(mine[0])}
        if seed % 4 == 0 and mine[0] != mine[1]:
            body |= {"model": "tiny", "adapters": [{"name": name_of(each)} for each in mine]}
        answer = self.client.post(COMPLETIONS, json=body)
        if answer.status_code == 404:
            assert min(mine) < CHANGED, answer.text
            return
        assert answer.status_code == 200, answer.text
        self.answers.append((answer.headers["Infuse-Adapter"], answer.json()["choices"][0]["text"]))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within, adapters are replaced and deleted, one after the other."""
        ended = threading.Event()

        def change() -> None:
            choose = random.Random(0)
            while not ended.wait(0.02):
                self._change(choose.randrange(CHANGED), choose)

        with ThreadPoolExecutor(1) as thread:
            changing = thread.submit(change)
            try:
                yield
            finally:
                ended.set()
            changing.result()

    def _change(self, number: int, choose: random.Random) -> None:
        kind = choose.randrange(KINDS)
        change = choose.choice(["replace", "delete"])
        if change == "delete":
            assert self.client.delete(f"/v1/adapters/{name_of(number)}").status_code == 204
        method = "PUT" if change == "replace" else "POST"
        answer = upload(self.client, name_of(number), self.kinds[str(kind)], method)
        assert answer.is_success, answer.text
        self.kind_of[number, answer.json()["revision"]] = kind
        self.changes[change] += 1

    def wrong(self, expected: Callable[..., str]) -> list[str]:
        """The answers that are not their revisions' own."""
        found = []
        for revisions, text in self.answers:
            made = [(int(number), int(each)) for number, each in REVISION.findall(revisions)]
            kinds = [self.kind_of.get(each, each[0] % KINDS) for each in made]
            if text != expected(*map(str, kinds)):
                found.append(f"{revisions} answered {text!r}")
        return found


@pytest.mark.parametrize(
    ("registered", "slots", "requests"),
    [
        (200, 16, 300),
        pytest.param(10_000, 64, 5_000, marks=[pytest.mark.full, pytest.mark.timeout(3600)]),
    ],
)
def test_every_answer_is_its_revisions_own_however_many_share_the_slots(
    registered: int,
    slots: int,
    requests: int,
    serve_adapters: ServeAdapters,
    model_folder: Path,
    kinds: dict[str, Path],
    tmp_path: Path,
) -> None:
    register(tmp_path / "store", kinds, registered)
    settings = {"adapters_dir": tmp_path / "store", "max_resident_adapters": slots}
    with serve_adapters(**settings, preload_adapters=None) as server:
        load = Load(server.base_url, kinds, registered)
        with load.client, load.changing(), ThreadPoolExecutor(ASKING) as threads:
            list(threads.map(load.ask, range(requests)))
        assert eventually(lambda: at_rest(server))
        swaps = server.services.registry.stats().swaps

    @cache
    def expected(*names: str) -> str:
        folders = {str(place): kinds[name] for place, name in enumerate(names)}
        return pefts_text(model_folder, folders, *folders)

    print(f"{len(load.answers)} answers, {swaps} slots filled, changes: {dict(load.changes)}")
    assert load.wrong(expected) == []
    assert len(load.answers) > requests * 0.8
    assert swaps > requests / 2
    assert min(load.changes["replace"], load.changes["delete"]) >= 5
