"""A faulty upload is answered with its faults, leaves nothing behind, and disturbs no request."""

import io
import json
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter, zip_of
from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle
from tests.api.test_adapters import ADAPTERS, complete
from tests.api.test_generation_lifecycle import events

STREAM: dict[str, Any] = {
    "model": "queries",
    "prompt": "The order arrived",
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": 24,
    "stream": True,
}
KEY = "base_model.model.model.layers.0.mlp.{}.ia3_l"
UP, DOWN = KEY.format("up_proj"), KEY.format("down_proj")
Files = dict[str, bytes]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def files(adapter_folders: dict[str, Path]) -> Files:
    return read_adapter(adapter_folders["mlp"])


def on_disk(server: RunningServer) -> list[str]:
    """Everything that the store keeps, staged or for good."""
    folder = server.services.settings.adapters_dir
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="session")
def alone(model_folder: Path, adapter_folders: dict[str, Path]) -> str:
    oracle = Oracle(model_folder, adapter_folders["queries"])
    return oracle.text(oracle.greedy(STREAM["prompt"], STREAM["max_tokens"]))


@pytest.fixture
def nothing_stays_and_nobody_is_disturbed(
    client: httpx.Client, server: RunningServer, alone: str
) -> Iterator[None]:
    """A stream runs beside the test, and brings what it brings alone."""
    names, before = server.services.registry.stored.names(), on_disk(server)
    with client.stream("POST", "/v1/completions", json=STREAM) as answer:
        chunks = events(answer)
        text = next(chunks)["choices"][0]["text"]
        yield
        text += "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == alone
    assert server.services.registry.stored.names() == names
    assert on_disk(server) == before


refused = pytest.mark.usefixtures("nothing_stays_and_nobody_is_disturbed")


def add(client: httpx.Client, files: Files, name: str = "refused") -> httpx.Response:
    return client.post(ADAPTERS, data={"name": name}, files=form_of(files))


def faults_of(response: httpx.Response) -> list[dict[str, str]]:
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_adapter"
    assert error["param"] == error["details"][0]["field"]
    assert error["message"]
    return list(error["details"])


def config(**values: Any) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        return {CONFIG: json.dumps(json.loads(files[CONFIG]) | values).encode()}

    return change


def weights(change_tensors: Callable[[Tensors], Tensors]) -> Callable[[Files], Files]:
    def change(files: Files) -> Files:
        tensors = load(files[WEIGHTS])
        return {WEIGHTS: save(tensors | change_tensors(tensors))}

    return change


def bytes_of(name: str, make: Callable[[bytes], bytes]) -> Callable[[Files], Files]:
    return lambda files: {name: make(files[name])}


def torch_saved(data: bytes) -> bytes:
    saved = io.BytesIO()
    torch.save(load(data), saved)
    return saved.getvalue()


def with_header(data: bytes, **entries: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]) | entries).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def poisoned(value: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {UP: torch.full_like(tensors[UP], value)}


def renamed(data: bytes, old: str, new: str) -> bytes:
    return save({key.replace(old, new): tensor for key, tensor in load(data).items()})


HUGE = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
BEHIND = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
FAULTS: dict[str, tuple[Callable[[Files], Files], str, str]] = {
    "LoRA": (config(peft_type="LORA"), "peft_type", "IA3 adapters only"),
    "no method": (bytes_of(CONFIG, lambda _: b"{}"), "peft_type", "IA3 adapters only"),
    "empty config": (bytes_of(CONFIG, lambda _: b""), CONFIG, "no JSON"),
    "binary config": (bytes_of(CONFIG, lambda _: b"\xff\x00"), CONFIG, "no JSON"),
    "config is a list": (bytes_of(CONFIG, lambda _: b"[1]"), CONFIG, "no JSON object"),
    "deep config": (bytes_of(CONFIG, lambda _: b"[" * 10**5), CONFIG, "no JSON"),
    "huge config": (bytes_of(CONFIG, lambda c: c + b" " * 2**20), CONFIG, "limit"),
    "wrong type": (config(target_modules=5), "target_modules", "valid"),
    "no target": (
        config(target_modules=["nope"], feedforward_modules=[]),
        "target_modules",
        "matches no module",
    ),
    "stray feed-forward": (
        config(feedforward_modules=["v_proj"]),
        "feedforward_modules",
        "must be a subset",
    ),
    "not linear": (
        config(target_modules=["mlp"], feedforward_modules=[]),
        "target_modules",
        "is no linear layer",
    ),
    "broken regex": (
        config(target_modules="(", feedforward_modules=""),
        "target_modules",
        "no reg",
    ),
    "no copy of a saved module": (
        config(modules_to_save=["lm_head"]),
        "base_model.model.lm_head.weight",
        "is missing",
    ),
    "pickle": (bytes_of(WEIGHTS, lambda _: pickle.dumps({})), WEIGHTS, "pickled"),
    "torch.save": (bytes_of(WEIGHTS, torch_saved), WEIGHTS, "pickled"),
    "empty weights": (bytes_of(WEIGHTS, lambda _: b""), WEIGHTS, "damaged"),
    "truncated": (bytes_of(WEIGHTS, lambda data: data[:-1]), WEIGHTS, "damaged"),
    "only a header": (bytes_of(WEIGHTS, lambda data: data[:100]), WEIGHTS, "damaged"),
    "too much": (bytes_of(WEIGHTS, lambda data: data + b"\0"), WEIGHTS, "damaged"),
    "long header": (bytes_of(WEIGHTS, lambda d: b"\xff" * 7 + d[7:]), WEIGHTS, "damaged"),
    "tensor past the end": (
        bytes_of(WEIGHTS, lambda d: with_header(d, a=HUGE)),
        WEIGHTS,
        "damaged",
    ),
    "overlapping": (bytes_of(WEIGHTS, lambda d: with_header(d, a=BEHIND)), WEIGHTS, "damaged"),
    "wrong size": (weights(lambda _: {UP: torch.ones(63, 1)}), UP, "(63, 1)"),
    "wrong side": (weights(lambda _: {UP: torch.ones(1, 64)}), UP, "needs (64, 1)"),
    "flat": (weights(lambda _: {DOWN: torch.ones(64)}), DOWN, "needs (1, 64)"),
    "scalar": (weights(lambda _: {DOWN: torch.tensor(1.0)}), DOWN, "needs (1, 64)"),
    "NaN": (weights(poisoned(float("nan"))), UP, "64 of 64 values are NaN or infinite"),
    "infinite": (weights(poisoned(float("inf"))), UP, "NaN or infinite"),
    "integers": (weights(lambda t: {UP: t[UP].int()}), UP, "dtype"),
    "unknown key": (weights(lambda _: {"x": torch.ones(1)}), "x", "belongs to no module"),
    "missing key": (bytes_of(WEIGHTS, lambda d: renamed(d, UP, "x")), UP, "is missing"),
}


@refused
@pytest.mark.parametrize(("change", "field", "problem"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_its_field_and_how_to_mend_it(
    client: httpx.Client, files: Files, change: Callable[[Files], Files], field: str, problem: str
) -> None:
    faults = faults_of(add(client, files | change(files)))

    assert all(fault["fix"] for fault in faults)
    problems = [fault["problem"] for fault in faults if fault["field"] == field]
    assert any(problem in each for each in problems), faults


@refused
def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(
    client: httpx.Client, files: Files
) -> None:
    packed = zip_of({CONFIG: files[CONFIG], "adapter_model.bin": torch_saved(files[WEIGHTS])})

    archive = client.post(ADAPTERS, data={"name": "refused"}, files={"archive": packed})
    alone = add(client, files | {WEIGHTS: torch_saved(files[WEIGHTS])})

    for response in (archive, alone):
        [fault] = faults_of(response)
        assert "pickled, which can run code" in fault["problem"].replace(
            "pickled weights", "pickled"
        )
        assert "save_pretrained" in fault["fix"]


@refused
def test_what_a_pickle_would_run_is_not_run(
    client: httpx.Client, files: Files, tmp_path: Path
) -> None:
    class Touch:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.touch, (tmp_path / "ran",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        faults_of(add(client, files | {WEIGHTS: pickle.dumps(Touch(), protocol)}))

    assert not (tmp_path / "ran").exists()


@refused
def test_all_faults_come_in_one_answer(client: httpx.Client, files: Files) -> None:
    broken = {UP: torch.ones(3, 1), DOWN: torch.full((1, 64), torch.nan), "x": torch.ones(1)}

    faults = faults_of(add(client, files | weights(lambda _: broken)(files)))
    both = faults_of(add(client, {CONFIG: b"{", WEIGHTS: b"{"}))

    assert {fault["field"] for fault in faults} == {UP, DOWN, "x"}
    assert {fault["field"] for fault in both} == {CONFIG, WEIGHTS}


@refused
def test_a_misspelt_key_is_answered_with_the_right_one(client: httpx.Client, files: Files) -> None:
    misspelt = UP.replace("up_proj", "up_porj")

    faults = faults_of(add(client, files | {WEIGHTS: renamed(files[WEIGHTS], UP, misspelt)}))

    [fault] = [fault for fault in faults if fault["field"] == misspelt]
    assert fault["fix"] == f"did you mean {UP}?"


@refused
def test_a_thousand_faults_are_summed_up(client: httpx.Client, files: Files) -> None:
    many = {f"{UP}.{number}": torch.ones(1) for number in range(20_000)}

    response = add(client, files | weights(lambda _: many)(files))

    *shown, last = faults_of(response)
    assert len(shown) == 50
    assert "19950 more faults" in last["problem"]


HOSTILE = r"(?:(.)|(.\1?))+[A-Z]"


@refused
@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"]
)
def test_a_hostile_regex_costs_a_second_while_others_generate(
    client: httpx.Client, server: RunningServer, files: Files, field: str
) -> None:
    value: Any = [HOSTILE] if field == "modules_to_save" else HOSTILE
    changed = {"target_modules": ".*_proj", "feedforward_modules": "x"} | {field: value}
    upload = files | config(**changed)(files)

    began = time.monotonic()
    with (
        ThreadPoolExecutor(1) as other,
        httpx.Client(base_url=server.base_url, timeout=60) as uploader,
    ):
        answer = other.submit(add, uploader, upload)
        served = 0
        while not answer.done():
            assert complete(client, "default").status_code == 200
            served += 1
        seconds = time.monotonic() - began

    [fault] = faults_of(answer.result())
    assert fault["field"] == field
    assert seconds < 60  # Unbroken, it would take years.
    assert field == "modules_to_save" or served >= 3
