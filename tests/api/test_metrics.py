"""The metrics of a real server's requests, as Prometheus scrapes them."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from infuse.server.observability.metrics import Metrics, build_info
from infuse.server.services import Services
from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.api.oracle import upload
from tests.api.test_adapters import ADAPTERS, PROMPT, complete
from tests.api.test_gateway_metrics import StartServer
from tests.api.test_streaming import COMPLETIONS, eventually

IN_USE = (
    "requests_running",
    "requests_waiting",
    "adapters_pinned",
    "adapter_leases",
    "kv_tokens_used",
)
Sample = tuple[str, frozenset[tuple[str, str]]]
"""A series, by its name and labels."""


@pytest.fixture(scope="module")
def alone(
    model_folder: Path, adapter_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Services]]:
    """A server whose counters move for these tests only."""
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=tmp_path_factory.mktemp("metrics"),
        preload_adapters=adapter_folders["mlp"].parent,
        max_batch_rows=4,
    )
    with run_server(settings) as running:
        yield running


@pytest.fixture
def client(alone: tuple[str, Services]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=alone[0], timeout=60) as client:
        yield client


def scrape(client: httpx.Client) -> dict[Sample, float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def series(name: str, **labels: str) -> Sample:
    return name, frozenset(labels.items())


def moved(before: dict[Sample, float], after: dict[Sample, float]) -> dict[Sample, float]:
    """By how much each series moved, without the buckets and birthdays."""
    return {
        each: value - before.get(each, 0.0)
        for each, value in after.items()
        if value != before.get(each, 0.0) and not each[0].endswith(("_bucket", "_created"))
    }


def test_every_metric_has_a_name_of_ours_or_one_that_gateways_read_and_a_help_text(
    client: httpx.Client,
) -> None:
    complete(client, "mlp")

    families = list(text_string_to_metric_families(client.get("/metrics").text))

    assert {family.name for family in families} >= {
        "infuse_requests",
        "infuse_prompt_tokens",
        "infuse_generated_tokens",
        "infuse_time_to_first_token_seconds",
        "infuse_time_per_output_token_seconds",
        "infuse_request_seconds",
        "infuse_requests_running",
        "infuse_requests_waiting",
        "infuse_kv_tokens_used",
        "infuse_kv_tokens_cached",
        "infuse_prefix_cache_query_tokens",
        "infuse_prefix_cache_hit_tokens",
        "infuse_kv_tokens_limit",
        "infuse_adapters_registered",
        "infuse_adapters_resident",
        "infuse_adapters_pinned",
        "infuse_adapter_leases",
        "infuse_memory_bytes",
        "infuse_adapter_swaps",
        "infuse_preemptions",
        "infuse_steps",
        "infuse_drafted_tokens",
        "infuse_accepted_tokens",
        "infuse_queue_seconds",
        "infuse_http_requests",
        "infuse_http_request_seconds",
        "infuse_http_requests_in_flight",
        "infuse_http_connections",
        "infuse_http_connections_limit",
        "infuse_engine_alive",
        "infuse_engine_ready",
        "infuse_requests_running_limit",
        "infuse_requests_waiting_limit",
        "infuse_adapters_resident_limit",
        "infuse_build_info",
    }
    others = {family.name for family in families if not family.name.startswith("infuse_")}
    of_python = {each for each in others if each.startswith(("process_", "python_"))}
    assert of_python >= {"process_resident_memory_bytes", "process_open_fds", "python_info"}
    assert others - of_python == {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
        "vllm:cache_config_info",
    }
    assert all(family.documentation for family in families)


@pytest.mark.parametrize(("model", "label"), [("mlp", "mlp"), ("mlp@1", "mlp"), ("tiny", "tiny")])
def test_a_request_is_counted_under_its_adapter(
    client: httpx.Client, model: str, label: str
) -> None:
    before = scrape(client)

    complete(client, model)

    changes = moved(before, scrape(client))
    assert changes[series("infuse_requests_total", adapter=label, outcome="length")] == 1
    assert changes[series("infuse_prompt_tokens_total", adapter=label)] == len(PROMPT["prompt"])
    assert changes[series("infuse_generated_tokens_total", adapter=label)] == 8
    for clock in ("queue", "time_to_first_token", "time_per_output_token", "request"):
        assert changes[series(f"infuse_{clock}_seconds_count")] == 1
        assert 0 < changes[series(f"infuse_{clock}_seconds_sum")] < 60
    assert changes[series("infuse_steps_total")] >= 8


def test_each_choice_counts_and_each_stops_for_its_reason(client: httpx.Client) -> None:
    stop = complete(client, "mlp").json()["choices"][0]["text"][3]
    before = scrape(client)

    client.post(COMPLETIONS, json=PROMPT | {"model": "mlp", "n": 3, "stop": stop})

    changes = moved(before, scrape(client))
    assert changes[series("infuse_requests_total", adapter="mlp", outcome="stop")] == 3


def test_a_client_that_leaves_is_counted_as_cancelled(client: httpx.Client) -> None:
    before = scrape(client)
    body = PROMPT | {"model": "mlp", "max_tokens": 200, "stream": True}

    with client.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())

    cancelled = series("infuse_requests_total", adapter="mlp", outcome="cancelled")
    assert eventually(lambda: moved(before, scrape(client)).get(cancelled) == 1)
    assert eventually(lambda: scrape(client)[series("infuse_requests_running")] == 0)


@pytest.mark.parametrize("model", ["nobody", "mlp@99", "x" * 900, 'a"} 1\n', "other"])
def test_an_unknown_model_makes_no_series(client: httpx.Client, model: str) -> None:
    complete(client, "mlp")
    assert complete(client, "missing").status_code == 404
    scrape(client)
    before = scrape(client)

    assert complete(client, model).status_code == 404

    assert scrape(client).keys() == before.keys()


def test_the_gauges_say_what_runs_and_what_is_there(
    client: httpx.Client, alone: tuple[str, Services]
) -> None:
    body = PROMPT | {"model": "mlp", "n": 40, "max_tokens": 200, "stream": True}
    busy: dict[Sample, float] = {}

    def all_rows_run() -> bool:
        busy.update(scrape(client))
        used = busy[series("infuse_kv_tokens_used")]
        return busy[series("infuse_requests_running")] == 4 and used >= 4 * len(PROMPT["prompt"])

    with client.stream("POST", COMPLETIONS, json=body) as response:
        # A reader that is let go would close the stream.
        lines = response.iter_lines()
        next(lines)
        # vLLM may send the first choice's token before it starts the others.
        assert eventually(all_rows_run)
    assert eventually(lambda: scrape(client)[series("infuse_adapter_leases")] == 0)
    idle = scrape(client)

    during = {name: busy[series(f"infuse_{name}")] for name in IN_USE}
    assert (during["requests_running"], during["adapters_pinned"]) == (4, 1)
    assert during["requests_waiting"] + 4 <= during["adapter_leases"] <= 40
    assert not any(idle[series(f"infuse_{name}")] for name in IN_USE)
    assert idle[series("infuse_kv_tokens_limit")] > 0
    stats = alone[1].engine.stats()
    for part in ("weights", "kv_cache", "bank"):
        expected = getattr(stats, f"{part}_bytes")
        assert idle[series("infuse_memory_bytes", part=part)] == expected > 0
    unused = idle[series("infuse_memory_bytes", part="unused_adapters")]
    assert unused == alone[1].registry.stats().host_bytes


def test_adapters_are_counted_as_they_come_and_go(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    registered = series("infuse_adapters_registered")
    before = scrape(client)[registered]

    upload(client, "passing", adapter_folders["mlp"])
    with_it = scrape(client)[registered]
    client.delete(f"{ADAPTERS}/passing")

    assert with_it == before + 1
    assert scrape(client)[registered] == before


def test_a_swap_is_counted_when_an_adapter_takes_a_slot(client: httpx.Client) -> None:
    swaps, resident = series("infuse_adapter_swaps_total"), series("infuse_adapters_resident")
    before = scrape(client)

    complete(client, "queries")
    first = scrape(client)
    complete(client, "queries")

    assert first[swaps] == before[swaps] + 1
    assert first[resident] == before[resident] + 1
    assert scrape(client)[swaps] == first[swaps]


def test_however_many_adapters_come_their_series_are_few(alone: tuple[str, Services]) -> None:
    services = alone[1]
    metrics = Metrics(services.engine.stats, services.registry.stats, build_info("native"))

    for number in range(1000):
        metrics.generation.request_started(f"a{number}").finished("stop", 1, 1)

    exposed = metrics.expose().decode()
    assert exposed.count("infuse_requests_total{") == 101
    assert 'infuse_requests_total{adapter="other",outcome="stop"} 900.0' in exposed
    assert 'adapter="a0"' in exposed


def test_what_the_prefix_cache_spares_is_counted_and_reported(client: httpx.Client) -> None:
    prompt = "Each of these words is read once: " + "and again " * 5
    before = scrape(client)
    cached = []
    block = 32  # At most: what is cached ends with a block.
    for salt in ("ours", "ours", "theirs"):
        body = {"model": "mlp", "prompt": prompt, "max_tokens": 2, "cache_salt": salt}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    changes = moved(before, scrape(client))

    spared = cached[1]
    assert len(prompt) - block <= spared < len(prompt)
    assert cached == [0, spared, 0]
    assert changes[series("infuse_prefix_cache_query_tokens_total")] == 3 * len(prompt)
    assert changes[series("infuse_prefix_cache_hit_tokens_total")] == spared


@pytest.mark.native
def test_what_is_kept_for_later_requests_is_counted(client: httpx.Client) -> None:
    kept = series("infuse_kv_tokens_cached")
    prompt = "Nobody has asked this before, and somebody may again."
    before = scrape(client)[kept]

    client.post("/v1/completions", json={"model": "mlp", "prompt": prompt, "max_tokens": 2})

    assert scrape(client)[kept] >= before + len(prompt)


@pytest.mark.parametrize(
    ("method", "path", "route", "status"),
    [
        ("GET", "/v1/models", "/v1/models", "200"),
        ("HEAD", "/v1/models", "/v1/models", "200"),
        ("GET", "/v1/adapters/mlp", "/v1/adapters/{name}", "200"),
        ("GET", "/v1/adapters/nobody", "/v1/adapters/{name}", "404"),
        ("GET", "/v1/adapters/owner/name/revisions", "/v1/adapters/{name}/revisions", "404"),
        ("PUT", "/v1/models", "/v1/models", "405"),
        ("GET", "/nowhere", "other", "404"),
        ("PROPFIND", "/v1/models", "/v1/models", "405"),
    ],
)
def test_an_http_request_is_counted_under_its_route_and_status(
    client: httpx.Client, method: str, path: str, route: str, status: str
) -> None:
    before = scrape(client)

    client.request(method, path)

    changes = moved(before, scrape(client))
    known = "other" if method == "PROPFIND" else method
    counted = series("infuse_http_requests_total", method=known, route=route, status=status)
    assert changes[counted] == 1
    assert changes[series("infuse_http_request_seconds_count", route=route)] == 1


def test_a_request_that_is_refused_by_its_key_is_counted_under_its_route(
    start_server: StartServer, tmp_path: Path
) -> None:
    keys = [{"name": "prometheus", "key": "reads-the-metrics", "roles": ["metrics"]}]
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    url, _ = start_server(keys_file=tmp_path / "keys.json")
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = "Bearer reads-the-metrics"
        refused = series(
            "infuse_http_requests_total", method="GET", route="/v1/models", status="401"
        )
        assert scrape(client)[refused] == 1


def test_open_connections_and_refused_ones_are_counted(client: httpx.Client) -> None:
    refused = series("infuse_http_connections_refused_total", code="invalid_request")
    before = scrape(client).get(refused, 0.0)
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port), timeout=60) as connection:
        connection.sendall(b"no request at all\r\n\r\n")
        assert connection.recv(99).startswith(b"HTTP/1.1 400")

    assert scrape(client)[refused] == before + 1
    assert eventually(lambda: scrape(client)[series("infuse_http_connections")] >= 1)
    assert scrape(client)[series("infuse_http_connections_limit")] == 1000


def test_the_limits_of_what_fills_up_stand_beside_it(client: httpx.Client) -> None:
    found = scrape(client)

    limits = ("requests_running", "requests_waiting", "adapters_resident")
    assert [found[series(f"infuse_{name}_limit")] for name in limits] == [4, 256, 256]
    assert found[series("infuse_engine_alive")] == found[series("infuse_engine_ready")] == 1
    assert found[series("infuse_http_requests_in_flight")] == 1, "the scrape itself"


def test_a_request_that_waits_for_a_batch_row_counts_as_queue_time(client: httpx.Client) -> None:
    before = scrape(client)

    client.post(COMPLETIONS, json=PROMPT | {"model": "mlp", "n": 9})

    changes = moved(before, scrape(client))
    queue, first = (
        changes[series(f"infuse_{clock}_seconds_sum")] for clock in ("queue", "time_to_first_token")
    )
    assert changes[series("infuse_queue_seconds_count")] == 9
    assert 0 < queue < first


def test_the_build_is_named(client: httpx.Client, alone: tuple[str, Services]) -> None:
    engine = alone[1].settings.engine
    labels = {"version": version("infuse-server"), "engine": engine, "torch": version("torch")}

    assert scrape(client)[series("infuse_build_info", **labels)] == 1


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool: apt-get install prometheus"
)
def test_promtool_finds_no_fault_in_metrics_of_our_own(client: httpx.Client) -> None:
    """Gateways set the names that begin with `vllm:`; a colon is not for servers, says promtool."""
    complete(client, "mlp")
    lines = client.get("/metrics").text.splitlines()
    ours = "\n".join(line for line in lines if "vllm:" not in line) + "\n"

    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=ours, capture_output=True, text=True, check=False
    )

    assert (checked.returncode, checked.stderr) == (0, "")
