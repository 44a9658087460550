"""Merges over HTTP: their results, and what is refused."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.server.jobs import MergeJobs
from tests.api.conftest import Gate, RunningServer
from tests.api.oracle import Oracle, upload
from tests.api.test_adapters_life import BODY, error_of, text_of
from tests.api.test_streaming import eventually

ADAPTERS = "/v1/adapters"
MERGES = "/v1/merges"
BOTH = [{"name": "default", "weight": 0.5}, {"name": "queries", "weight": 0.5}]


@pytest.fixture(autouse=True)
def no_merge_stays(client: httpx.Client) -> Iterator[None]:
    yield
    assert eventually(lambda: delete_all(client))


def delete_all(client: httpx.Client) -> bool:
    """Delete every merge: one call cancels a running merge, another removes it."""
    for job in client.get(MERGES).json()["data"]:
        client.delete(f"{MERGES}/{job['id']}")
    return client.get(MERGES).json()["data"] == []


def start(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post(MERGES, json=body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"{MERGES}/{job['id']}"
    return job


def ended(client: httpx.Client, job: dict[str, Any], state: str = "succeeded") -> dict[str, Any]:
    path = f"{MERGES}/{job['id']}"
    assert eventually(lambda: client.get(path).json()["finished"] is not None)
    now: dict[str, Any] = client.get(path).json()
    assert now["state"] == state, now
    return now


def unpacked(client: httpx.Client, job: dict[str, Any], folder: Path) -> Path:
    answer = client.get(f"{MERGES}/{job['id']}/archive")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-tar"
    assert int(answer.headers["content-length"]) == len(answer.content)
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as archive:
        archive.extractall(folder, filter="data")
    return folder / job["id"]


def merged_text(client: httpx.Client, tmp_path: Path, **body: Any) -> str:
    """What plain transformers says with a merged model."""
    job = start(client, **body)
    ended(client, job)
    oracle = Oracle(unpacked(client, job, tmp_path))
    return oracle.text(oracle.greedy(str(BODY["prompt"]), BODY["max_tokens"]))


# What they yield


def test_a_merged_model_says_what_the_adapter_says(client: httpx.Client, tmp_path: Path) -> None:
    assert merged_text(client, tmp_path, adapter="mlp") == text_of(client, "mlp")


@pytest.mark.parametrize("composition", ["product", "linear"])
def test_several_are_merged_as_a_request_mixes_them(
    client: httpx.Client, tmp_path: Path, composition: str
) -> None:
    mixture = {"adapters": BOTH, "composition": composition}

    assert merged_text(client, tmp_path, **mixture) == text_of(client, "tiny", **mixture)


def test_a_part_of_one_is_merged_as_its_strength_says(client: httpx.Client, tmp_path: Path) -> None:
    part = text_of(client, "mlp", strength=0.5)

    assert merged_text(client, tmp_path, adapter="mlp", strength=0.5) == part


def test_the_recipe_names_revisions_with_their_digests(
    client: httpx.Client, tmp_path: Path
) -> None:
    job = start(client, adapters=[{"name": "default"}, {"name": "queries@1", "weight": 0.5}])
    parts = [
        {"name": f"{name}@1", "digest": client.get(f"{ADAPTERS}/{name}").json()["digest"]}
        for name in ("default", "queries")
    ]

    assert job["recipe"] == {
        "method": "product",
        "adapters": [parts[0] | {"weight": 1.0}, parts[1] | {"weight": 0.5}],
    }
    ended(client, job)
    card = (unpacked(client, job, tmp_path) / "README.md").read_text()
    assert f"queries@1 * 0.5  (sha256 {parts[1]['digest']})" in card


def test_the_archive_is_a_model_with_its_tokenizer(client: httpx.Client, tmp_path: Path) -> None:
    job = start(client, adapter="mlp")
    folder = unpacked(client, ended(client, job), tmp_path)

    AutoModelForCausalLM.from_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert client.get(f"{MERGES}/{job['id']}").json()["size"] == size


def test_an_adapter_that_changes_meanwhile_is_merged_as_it_was(
    client: httpx.Client, adapter_folders: dict[str, Path], tmp_path: Path, gate: Gate
) -> None:
    upload(client, "moving", adapter_folders["mlp"])
    first = start(client, adapter="moving")
    second = start(client, adapter="moving")
    assert gate.reached.wait(60)
    upload(client, "moving", adapter_folders["queries"], "PUT")
    client.delete(f"{ADAPTERS}/moving")
    gate.open.set()
    wanted = start(client, adapter="mlp")
    weights = [
        load_file(unpacked(client, ended(client, job), tmp_path) / "model.safetensors")
        for job in (first, second, wanted)
    ]

    for one in weights[:2]:
        assert all(tensor.equal(weights[2][key]) for key, tensor in one.items())


# How far they are


def test_a_merge_waits_runs_and_succeeds(client: httpx.Client, gate: Gate) -> None:
    first, second = start(client, adapter="mlp"), start(client, adapter="queries")
    assert (first["state"], first["progress"]) == ("queued", 0.0)
    assert gate.reached.wait(60)
    paths = [f"{MERGES}/{job['id']}" for job in (first, second)]
    assert [client.get(path).json()["state"] for path in paths] == ["running", "queued"]
    refused = [error_of(client.get(f"{path}/archive"), 409) for path in paths]
    assert [error["code"] for error in refused] == ["merge_not_done"] * 2
    assert "is running" in refused[0]["message"]
    gate.open.set()

    assert ended(client, first)["progress"] == ended(client, second)["progress"] == 1.0


def test_merges_begin_in_turns_among_keys(model_folder: Path, tmp_path: Path, gate: Gate) -> None:
    jobs = MergeJobs(tmp_path, str(model_folder), "tiny")
    recipe = {"method": "product", "adapters": [{"name": "a@1", "digest": "0", "weight": 1.0}]}
    flood = [jobs.submit(AdapterVectors({}), recipe, "flood").id for _ in range(3)]
    other = [jobs.submit(AdapterVectors({}), recipe, "other").id for _ in range(2)]
    gate.open.set()
    assert eventually(lambda: all(jobs.get(each).ended for each in (*flood, *other)))
    ended = sorted(jobs.page(None, 10), key=lambda job: str(job.finished))
    jobs.close()

    first, *_ = flood
    assert [job.id for job in ended] == [first, other[0], flood[1], other[1], flood[2]]


def test_requests_are_answered_while_a_merge_runs(client: httpx.Client, gate: Gate) -> None:
    before = text_of(client, "mlp")
    job = start(client, adapter="mlp")
    assert gate.reached.wait(60)

    assert text_of(client, "mlp") == before
    assert client.get(f"{MERGES}/{job['id']}").json()["state"] == "running"


def test_merges_are_listed_in_pages_oldest_first(client: httpx.Client) -> None:
    ids = [start(client, adapter=name)["id"] for name in ("mlp", "queries", "default")]
    first = client.get(MERGES, params={"limit": 2}).json()
    rest = client.get(MERGES, params={"limit": 2, "after": first["next"]}).json()

    assert [job["id"] for job in (*first["data"], *rest["data"])] == ids
    assert (first["object"], first["next"], rest["next"]) == ("list", ids[1], None)


# Cancelling and deleting


def test_a_merge_is_cancelled_while_it_waits_or_runs_and_leaves_nothing(
    client: httpx.Client, server: RunningServer, gate: Gate
) -> None:
    running, waiting = start(client, adapter="mlp"), start(client, adapter="queries")
    assert gate.reached.wait(60)
    for job in (running, waiting):
        assert client.delete(f"{MERGES}/{job['id']}").status_code == 204
    assert client.get(f"{MERGES}/{waiting['id']}").json()["state"] == "cancelled"
    gate.open.set()

    for job in (running, waiting):
        assert ended(client, job, "cancelled")["error"] is None
        assert error_of(client.get(f"{MERGES}/{job['id']}/archive"), 409)
    folder = server.services.settings.adapters_dir / "merges"
    files = {f"{job['id']}.json" for job in (running, waiting)}
    assert {path.name for path in folder.iterdir()} == files | {"lock"}


def test_a_deleted_merge_is_gone_and_its_download_goes_on(
    client: httpx.Client, server: RunningServer
) -> None:
    job = start(client, adapter="mlp")
    ended(client, job)
    path = f"{MERGES}/{job['id']}"
    whole = client.get(f"{path}/archive").content
    with client.stream("GET", f"{path}/archive") as download:
        chunks = download.iter_bytes(512)
        first = next(chunks)
        assert client.delete(path).status_code == 204
        assert first + b"".join(chunks) == whole

    for again in (client.get(path), client.get(f"{path}/archive"), client.delete(path)):
        assert error_of(again, 404)["code"] == "merge_not_found"
    folder = server.services.settings.adapters_dir / "merges"
    assert [each.name for each in folder.iterdir()] == ["lock"]


# What they refuse


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({}, 400, "either adapter or adapters"),
        ({"adapter": "mlp", "adapters": BOTH}, 400, "either adapter or adapters"),
        ({"adapter": "mlp", "composition": "linear"}, 400, "composition is for adapters"),
        ({"adapters": BOTH, "strength": 0.5}, 400, "strength is for one adapter"),
        ({"adapters": []}, 400, "at least 1"),
        ({"adapters": BOTH * 33}, 400, "at most 64"),
        ({"adapters": BOTH, "composition": "ties"}, 400, "composition"),
        ({"adapters": [{"name": "mlp", "weigth": 1}]}, 400, "weigth"),
        ({"adapter": "mlp", "strength": "1"}, 400, "strength"),
        ({"adapter": "mlp", "strength": 1e300}, 400, "strength"),
        ({"adapter": "mlp", "safe": True}, 400, "safe"),
        ({"adapter": "nobody"}, 404, "nobody"),
        ({"adapter": "mlp@7"}, 404, "revision 7"),
        ({"adapter": "tiny"}, 404, "tiny"),
    ],
    ids=str,
)
def test_what_cannot_be_merged_is_refused_and_no_job_is_made(
    client: httpx.Client, body: dict[str, Any], status: int, said: str
) -> None:
    error = error_of(client.post(MERGES, json=body), status)

    assert said in json.dumps(error)
    assert client.get(MERGES).json()["data"] == []


def test_a_disabled_adapter_is_not_merged(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    upload(client, "off", adapter_folders["mlp"])
    client.patch(f"{ADAPTERS}/off", json={"enabled": False})

    assert error_of(client.post(MERGES, json={"adapter": "off"}), 403)
    client.delete(f"{ADAPTERS}/off")


def test_a_disk_that_is_too_small_is_507_before_anything_is_written(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    error = error_of(client.post(MERGES, json={"adapter": "mlp"}), 507)

    assert "The merged model takes" in error["message"]
    assert client.get(MERGES).json()["data"] == []


@pytest.mark.usefixtures("gate")
def test_a_merge_too_many_is_429_with_a_time_to_come_back(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.jobs.MAX_WAITING", 2)
    for _ in range(2):
        start(client, adapter="mlp")
    refused = client.post(MERGES, json={"adapter": "mlp"})

    assert error_of(refused, 429)["code"] == "too_many_merges"
    assert int(refused.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", ["", "/archive"])
@pytest.mark.parametrize("name", ["nobody", "merge-1", "..", "x" * 120])
def test_an_unknown_merge_is_404(client: httpx.Client, name: str, path: str) -> None:
    assert client.get(f"{MERGES}/{name}{path}").status_code == 404
