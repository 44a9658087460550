"""Replicas of `infuse deploy`, as clients see them."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from infuse.server.settings import MEBIBYTE
from tests.api.archives import form_of, read_adapter
from tests.api.collectors import Collector, collector
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, COMPLETIONS, complete
from tests.api.test_traces import by_name, check_whole, named, point_to
from tests.on_ray.deployed import Deployment, deployed

pytest.importorskip("ray")
pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
PROMPT = "The order arrived"


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    with collector() as collected:
        yield collected


@pytest.fixture(scope="module")
def deployment(
    collected: Collector,
    model_folder: Path,
    adapter_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    flags = [f"--model={model_folder}", "--served-model-name=tiny", "--max-batch-rows=8"]
    flags += [f"--adapters-dir={folder / 'store'}", "--shared-store", "--replica-lease=5"]
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, collected.url)
        with deployed(folder, 3, flags) as deployment:
            for name, adapter in adapter_folders.items():
                assert upload(deployment.client, name, adapter).status_code == 201
            yield deployment


@pytest.fixture
def client(deployment: Deployment) -> httpx.Client:
    return deployment.client


def counted(client: httpx.Client, name: str, **labels: str) -> dict[str, float]:
    """Replica -> the sum of its series of a metric with these labels."""
    counts: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            replica = line.partition('replica="')[2].partition('"')[0]
            counts[replica] = counts.get(replica, 0) + float(line.rpartition(" ")[2])
    return counts


def test_openais_client_gets_the_same_text_whole_and_streamed(deployment: Deployment) -> None:
    with OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0) as ai:
        asked = {"model": "default", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        whole = ai.completions.create(**asked)
        streamed = list(ai.completions.create(**asked, stream=True))

    assert len(streamed) > 2
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text


def test_an_error_is_the_servers_own(client: httpx.Client) -> None:
    answer = complete(client, "nobody")

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_client_that_leaves_cancels_its_request(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    name, before = "infuse_requests_total", {"outcome": "cancelled"}
    cancelled = sum(counted(client, name, **before).values())
    with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as answer:
        next(answer.iter_lines())

    deadline = time.monotonic() + 120
    while sum(counted(client, name, **before).values()) == cancelled:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_large_upload_comes_whole(client: httpx.Client, adapter_folders: dict[str, Path]) -> None:
    """The server's own answer, after all of its bytes: they are more than a form of files takes."""
    files = form_of(read_adapter(adapter_folders["default"]))
    files["weights"] += bytes(40 * MEBIBYTE)
    answer = client.post(ADAPTERS, data={"name": "large"}, files=files)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "invalid_adapter"


def test_requests_go_where_their_adapter_and_the_beginning_of_their_prompt_are_known(
    client: httpx.Client,
) -> None:
    name, labels = "infuse_requests_total", {"adapter": "mlp"}
    for number in range(12):
        answer = complete(client, "mlp")
        assert answer.status_code == 200, number

    assert sorted(counted(client, name, **labels).values()) == [12]


def test_merges_are_found_whichever_replica_is_asked_for_other_things(
    client: httpx.Client,
) -> None:
    made = client.post("/v1/merges", json={"adapter": "default"})
    assert made.status_code == 202, made.text

    for _ in range(6):
        assert client.get(f"/v1/merges/{made.json()['id']}").status_code == 200


def test_a_request_has_its_trace_on_whichever_replica_it_runs(
    client: httpx.Client, collected: Collector
) -> None:
    body = {"model": "mlp", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    client.post(COMPLETIONS, json=body, headers=named("on-ray"))

    spans = by_name(collected.trace("on-ray"))
    check_whole(spans, f"POST {COMPLETIONS}", "text_completion mlp")


def test_the_usage_of_all_replicas_is_one_report(client: httpx.Client) -> None:
    def requests() -> int:
        report = client.get("/v1/usage").json()
        assert report["machines"] == [socket.gethostname()]
        return sum(each["requests"] for each in report["data"])

    before = requests()
    for model in ("mlp", "queries", "default", "tiny"):
        assert complete(client, model).status_code == 200

    assert requests() == before + 4


def test_every_replica_has_its_series(deployment: Deployment) -> None:
    assert len(deployment.running) == 3
