"""Traces over OTLP: each request's spans, their parents and times, at a real collector."""

import logging
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from infuse.server.observability.otlp import open_traces
from infuse.server.services import Services
from tests.api.collectors import Collector, attributes_of, collector
from tests.api.conftest import RunningServer, ServeAdapters
from tests.api.test_adapters import PROMPT, complete
from tests.api.test_streaming import CHAT, COMPLETIONS

MESSAGES = [{"role": "user", "content": "Where is my order?"}]
PARENT_ID = "00f067aa0ba902b7"
StartServer = Callable[..., tuple[str, Services]]


def point_to(patch: pytest.MonkeyPatch, url: str) -> None:
    patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    with collector() as collected:
        yield collected


@pytest.fixture(scope="module")
def traced(collected: Collector, serve_adapters: ServeAdapters) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, collected.url)
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=tests")
        with serve_adapters() as server:
            yield server


@pytest.fixture
def client(traced: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=traced.base_url, timeout=60) as client:
        yield client


def trace_id_of(request_id: str) -> str:
    return request_id.encode().hex()[:32].ljust(32, "0")


def named(request_id: str, *, sampled: bool = True) -> dict[str, str]:
    """The headers of a request that is part of somebody's trace."""
    flags = "01" if sampled else "00"
    return {
        "X-Request-Id": request_id,
        "traceparent": f"00-{trace_id_of(request_id)}-{PARENT_ID}-{flags}",
    }


def by_name(spans: list[Span]) -> dict[str, Span]:
    assert len({each.name for each in spans}) == len(spans)
    return {each.name: each for each in spans}


def check_whole(spans: dict[str, Span], server: str, generation: str) -> None:
    """Check that the spans are all there are, with the right parents, and that their times add
    up."""
    parents = {
        "prepare": server,
        generation: server,
        "send": server,
        "queue": generation,
        "prefill": generation,
        "decode": generation,
    }
    assert spans.keys() == parents.keys() | {server}
    for name, parent in parents.items():
        assert spans[name].parent_span_id == spans[parent].span_id
    begin = {name: each.start_time_unix_nano for name, each in spans.items()}
    end = {name: each.end_time_unix_nano for name, each in spans.items()}
    assert begin[server] == begin["prepare"]
    assert end["prepare"] == begin[generation] == begin["queue"]
    assert end["queue"] == begin["prefill"]
    assert end["prefill"] == begin["decode"]
    assert end["decode"] == end[generation] == begin["send"]
    assert end["send"] == end[server]
    assert all(begin[name] <= end[name] for name in spans)


def test_the_trace_of_an_answer_has_all_its_spans_below_its_clients(
    client: httpx.Client, collected: Collector
) -> None:
    body = {"model": "mlp", "messages": MESSAGES, "max_tokens": 8, "ignore_eos": True}
    answer = client.post(CHAT, json=body, headers=named("whole")).json()
    spans = by_name(collected.trace("whole"))

    check_whole(spans, f"POST {CHAT}", "chat mlp")
    own = spans[f"POST {CHAT}"]
    assert (own.trace_id.hex(), own.parent_span_id.hex()) == (trace_id_of("whole"), PARENT_ID)
    assert own.kind == Span.SpanKind.SPAN_KIND_SERVER
    assert attributes_of(own) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "http.response.status_code": 200,
        "url.path": CHAT,
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "infuse.request_id": "whole",
    }
    assert attributes_of(spans["chat mlp"]) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "infuse",
        "gen_ai.request.model": "mlp",
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "mlp@1",
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 8,
        "infuse.adapter.name": "mlp",
        "infuse.adapter.revision": 1,
    }


def test_a_resource_is_this_server_and_what_the_environment_says(
    client: httpx.Client, collected: Collector
) -> None:
    client.get("/v1/models", headers={"X-Request-Id": "resource"})
    collected.trace("resource")

    assert collected.resource["service.name"] == "infuse"
    assert collected.resource["service.instance.id"]
    assert collected.resource["deployment.environment.name"] == "tests"


def test_a_streamed_answer_has_the_same_spans(client: httpx.Client, collected: Collector) -> None:
    body = PROMPT | {"model": "mlp", "max_tokens": 8, "ignore_eos": True, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body, headers=named("streamed")) as response:
        list(response.iter_lines())
    spans = by_name(collected.trace("streamed"))

    check_whole(spans, f"POST {COMPLETIONS}", "text_completion mlp")
    assert attributes_of(spans["text_completion mlp"])["gen_ai.usage.output_tokens"] == 8


def test_an_answer_whose_client_leaves_is_traced_as_cancelled(
    client: httpx.Client, collected: Collector
) -> None:
    body = PROMPT | {"model": "mlp", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body, headers=named("left")) as response:
        next(response.iter_lines())
    spans = by_name(collected.trace("left"))

    check_whole(spans, f"POST {COMPLETIONS}", "text_completion mlp")
    generation = attributes_of(spans["text_completion mlp"])
    assert generation["gen_ai.response.finish_reasons"] == ["cancelled"]
    assert 1 <= generation["gen_ai.usage.output_tokens"] < 200


@pytest.mark.parametrize(("model", "status"), [("nowhere", 404), ("mlp", 400)])
def test_a_refused_request_has_one_span_with_its_status(
    client: httpx.Client, collected: Collector, model: str, status: int
) -> None:
    refused = client.post(
        COMPLETIONS,
        json={"model": model, "prompt": "x", "max_tokens": 1 << 20},
        headers=named(f"refused-{model}"),
    )
    [span] = collected.trace(f"refused-{model}")

    assert refused.status_code == status
    assert attributes_of(span)["http.response.status_code"] == status
    assert span.status.code == Status.StatusCode.STATUS_CODE_UNSET, "the client's own fault"


def test_a_request_of_the_base_names_no_adapter(client: httpx.Client, collected: Collector) -> None:
    body = PROMPT | {"model": "tiny"}
    client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "base"})
    spans = by_name(collected.trace("base"))

    generation = attributes_of(spans["text_completion tiny"])
    assert generation["gen_ai.response.model"] == "tiny"
    assert not any(name.startswith("infuse.adapter") for name in generation)
    assert spans[f"POST {COMPLETIONS}"].parent_span_id == b"", "nobody's trace"


def test_a_mixture_is_named_by_what_it_mixes(client: httpx.Client, collected: Collector) -> None:
    parts = [{"name": "mlp"}, {"name": "queries"}]
    body = PROMPT | {"model": "tiny", "adapters": parts, "max_tokens": 2}
    mixed = client.post(COMPLETIONS, json=body, headers={"X-Request-Id": "mixed"})
    spans = by_name(collected.trace("mixed"))

    generation = attributes_of(spans["text_completion tiny"])
    assert generation["infuse.adapter.name"] == mixed.headers["Infuse-Adapter"]
    assert "infuse.adapter.revision" not in generation


def test_each_choice_has_spans_of_its_own_and_a_flood_of_choices_has_no_flood_of_spans(
    client: httpx.Client, collected: Collector
) -> None:
    body = PROMPT | {"model": "mlp", "max_tokens": 2, "ignore_eos": True}
    client.post(COMPLETIONS, json=body | {"n": 3}, headers={"X-Request-Id": "three"})
    client.post(COMPLETIONS, json=body | {"n": 40}, headers={"X-Request-Id": "forty"})
    three = [each for each in collected.trace("three") if each.name == "decode"]
    forty = [each for each in collected.trace("forty") if each.name == "decode"]

    assert sorted(attributes_of(each)["infuse.choice"] for each in three) == [0, 1, 2]
    assert len(forty) == 16


def test_ranking_is_traced_without_decoding(client: httpx.Client, collected: Collector) -> None:
    body = {"model": "mlp", "inputs": [{"prompt": "2 + 2 =", "choices": [" 4"]}]}
    client.post("/v1/rank", json=body, headers={"X-Request-Id": "ranked"})
    spans = by_name(collected.trace("ranked"))

    assert {"rank mlp", "queue", "prefill"} <= spans.keys()
    assert "decode" not in spans


def test_the_clients_sampling_decision_holds_and_scrapes_are_not_traced(
    client: httpx.Client, collected: Collector
) -> None:
    for path, headers in (
        ("/v1/models", named("unsampled", sampled=False)),
        ("/metrics", named("scrape")),
        ("/health/ready", named("probe")),
        ("/v1/models", {"X-Request-Id": "broken", "traceparent": "00-nonsense"}),
    ):
        client.get(path, headers=headers)
    collected.trace("broken")

    assert not {"unsampled", "scrape", "probe"} & set(collected.requests())


@pytest.mark.fault(
    "network",
    "The collector of traces is down",
    by="a port on which nobody listens",
    promise="No request and no shutdown notices.",
)
def test_a_collector_that_is_down_hurts_no_request_and_no_shutdown(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    point_to(monkeypatch, f"http://127.0.0.1:{port}")
    url, _ = start_server()

    with httpx.Client(base_url=url, timeout=60) as client:
        assert [complete(client, "tiny").status_code for _ in range(20)] == [200] * 20


@pytest.mark.fault(
    "network",
    "The collector of traces hangs",
    by="a server that answers nothing",
    promise="No request and no shutdown notices.",
)
def test_a_collector_that_hangs_hurts_no_request_and_no_shutdown(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "8")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
        url, _ = start_server()
        with httpx.Client(base_url=url, timeout=60) as client:
            # Far more spans than wait for the collector at most.
            assert [complete(client, "tiny").status_code for _ in range(20)] == [200] * 20


def test_where_no_collector_is_named_nothing_is_imported_for_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "infuse.server.observability.traces", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    assert open_traces("1") is None
    assert "infuse.server.observability.traces" not in sys.modules


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_SDK_DISABLED": "true"}, ""),
        ({"OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"),
        ({}, "pip install 'infuse-server[otlp]'"),
    ],
)
def test_traces_that_are_off_or_cannot_be_sent_keep_no_server_from_starting(
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter: Any = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    monkeypatch.delitem(sys.modules, "infuse.server.observability.traces", raising=False)
    point_to(monkeypatch, "http://127.0.0.1:9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with caplog.at_level(logging.WARNING, "infuse.server.observability.otlp"):
        assert open_traces("1") is None

    assert said in caplog.text
    assert bool(caplog.records) == bool(said)


def test_an_endpoint_for_traces_alone_is_taken_too(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with collector() as collected:
        point_to(monkeypatch, "")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collected.url}/anywhere")
        url, _ = start_server()
        httpx.get(f"{url}/v1/models", headers={"X-Request-Id": "mine"})

        assert collected.trace("mine")
