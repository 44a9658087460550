"""What inference gateways read of a real server, and what a real Prometheus does.

The names and what they mean: Kubernetes' gateway-api-inference-extension, proposal 003, "Model
Server Protocol".
"""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from infuse.server.services import Services
from tests.api.test_adapters import PROMPT, complete
from tests.api.test_streaming import COMPLETIONS, eventually

StartServer = Callable[..., tuple[str, Services]]


@dataclass(frozen=True)
class Load:
    """A server's load, as an endpoint picker reads it."""

    queued: float
    running: float
    kv_cache: float
    """The share in use, from 0 to 1."""
    max_adapters: int
    running_adapters: frozenset[str]
    waiting_adapters: frozenset[str]
    updated: float
    """Unix time in seconds."""
    block_size: int
    blocks: int

    @classmethod
    def of(cls, client: httpx.Client) -> "Load":
        families = text_string_to_metric_families(client.get("/metrics").text)
        gauges = {family.name: family.samples for family in families if family.type == "gauge"}
        [queued], [running], [cache], [adapters], [blocks] = (
            gauges[f"vllm:{name}"]
            for name in (
                "num_requests_waiting",
                "num_requests_running",
                "kv_cache_usage_perc",
                "lora_requests_info",
                "cache_config_info",
            )
        )
        return cls(
            queued.value,
            running.value,
            cache.value,
            int(adapters.labels["max_lora"]),
            _names(adapters.labels["running_lora_adapters"]),
            _names(adapters.labels["waiting_lora_adapters"]),
            adapters.value,
            int(blocks.labels["block_size"]),
            int(blocks.labels["num_gpu_blocks"]),
        )


def _names(separated: str) -> frozenset[str]:
    return frozenset(separated.split(",")) - {""}


@contextmanager
def choices_of(client: httpx.Client, model: str, **headers: str) -> Iterator[None]:
    """Within: a request for many long choices is in flight; its client leaves in the end."""
    left = threading.Event()
    body = PROMPT | {"model": model, "n": 40, "max_tokens": 200, "stream": True}

    def read() -> None:
        with client.stream("POST", COMPLETIONS, json=body, headers=headers) as response:
            for _ in response.iter_lines():
                if left.is_set():
                    return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        left.set()
        reader.join()


def test_a_gateway_reads_the_load_and_the_adapters_as_requests_name_them(
    start_server: StartServer, adapter_folders: dict[str, Path]
) -> None:
    url, services = start_server(
        max_batch_rows=1,
        max_resident_adapters=7,
        preload_adapters=adapter_folders["mlp"].parent,
    )

    with httpx.Client(base_url=url, timeout=60) as client:
        before = time.time()
        with choices_of(client, "mlp"), choices_of(client, "queries@1"):
            both = {"mlp", "queries@1"}
            loads: list[Load] = []

            def is_busy() -> bool:
                loads.append(Load.of(client))
                return loads[-1].running == 1 and loads[-1].waiting_adapters == both

            assert eventually(is_busy)
            busy = loads[-1]
        assert eventually(lambda: Load.of(client).running == 0)
        idle = Load.of(client)

    assert 1 <= busy.queued <= 79
    assert 0 < busy.kv_cache <= 1
    # vLLM is given a request more than its batch has rows.
    assert busy.running_adapters
    assert busy.running_adapters <= both
    assert before <= busy.updated <= idle.updated <= time.time()
    assert (idle.queued, idle.kv_cache) == (0, 0)
    assert idle.running_adapters | idle.waiting_adapters == set()
    assert idle.max_adapters == 7
    total = services.engine.stats().kv_tokens_total
    assert idle.blocks == total // idle.block_size > 0


def test_the_base_and_mixtures_are_no_adapters_of_a_gateway(
    start_server: StartServer, adapter_folders: dict[str, Path]
) -> None:
    url, _ = start_server(max_batch_rows=1, preload_adapters=adapter_folders["mlp"].parent)

    with httpx.Client(base_url=url, timeout=60) as client, choices_of(client, "tiny"):
        assert eventually(lambda: Load.of(client).running == 1)
        load = Load.of(client)

    assert load.running_adapters | load.waiting_adapters == set()


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: apt-get install prometheus"
)
def test_a_real_prometheus_scrapes_the_server_with_its_key_and_knows_every_name(
    start_server: StartServer, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    keys = [
        {"name": "app", "key": "generates-and-no-more", "roles": ["generate"]},
        {"name": "prometheus", "key": "reads-the-metrics", "roles": ["metrics"]},
    ]
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    url, _ = start_server(
        keys_file=tmp_path / "keys.json", preload_adapters=adapter_folders["mlp"].parent
    )
    with httpx.Client(base_url=url, headers=_bearer(keys[0]), timeout=60) as client:
        assert complete(client, "mlp").status_code == 200
    with httpx.Client(base_url=url, headers=_bearer(keys[1]), timeout=60) as client:
        exposed = {
            sample.name
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
        }

    with prometheus(tmp_path, url, "reads-the-metrics") as api:
        assert eventually(lambda: found(api, "up == 1") != [])
        stored = set(api.get("/api/v1/label/__name__/values").json()["data"])
        [requests] = found(api, 'infuse_requests_total{adapter="mlp"}')
        [adapters] = found(api, "vllm:lora_requests_info")

    assert exposed <= stored
    assert requests["value"][1] == "1"
    assert adapters["metric"]["max_lora"] == "256"


def _bearer(key: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {key['key']}"}


def found(api: httpx.Client, query: str) -> list[Any]:
    result: list[Any] = api.get("/api/v1/query", params={"query": query}).json()["data"]["result"]
    return result


@contextmanager
def prometheus(folder: Path, url: str, key: str) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes the server at `url`; yields a client of its HTTP API."""
    config = {
        "scrape_configs": [
            {
                "job_name": "infuse",
                "scrape_interval": "1s",
                "authorization": {"credentials": key},
                "static_configs": [{"targets": [url.removeprefix("http://")]}],
            }
        ]
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address={address}",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=60) as api:
            assert eventually(lambda: _is_ready(api)), "Prometheus does not start"
            yield api
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(api: httpx.Client) -> bool:
    try:
        return api.get("/-/ready").status_code == 200
    except httpx.ConnectError:
        return False


def test_the_tokens_that_wait_are_those_of_prompts_and_a_part_of_each_answer(
    start_server: StartServer,
) -> None:
    url, services = start_server(max_batch_rows=1)
    tokens = len(services.engine.model.tokenizer.encode(PROMPT["prompt"])) + 64

    with httpx.Client(base_url=url, timeout=60) as client:
        with choices_of(client, "tiny"):
            assert eventually(lambda: services.engine.stats().running == 1)
            waiting = services.engine.stats().waiting_tokens
        assert eventually(lambda: services.engine.stats().waiting_tokens == 0)

    assert 0 < waiting <= 39 * tokens
    assert waiting % tokens == 0
