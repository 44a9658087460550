"""`GET /v1/usage`: what keys have used of adapters, exact over restarts and kills."""

import csv
import io
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.api.test_auth import error_of
from tests.api.test_scopes import COMPLETIONS, KEYS, as_key, write_keys
from tests.api.test_streaming import CHAT, eventually
from tests.served import address_of
from tests.test_listener import INFUSE

USAGE = "/v1/usage"
StartServer = Callable[..., tuple[str, Services]]
PROMPT = {"prompt": [5] * 20, "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def client(start_server: StartServer, adapter_folders: dict[str, Path]) -> Iterator[httpx.Client]:
    """Of a server that has answered nothing yet."""
    url, _ = start_server(preload_adapters=adapter_folders["mlp"].parent)
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def rows(client: httpx.Client, **query: Any) -> list[dict[str, Any]]:
    answer = client.get(USAGE, params=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def sums(found: list[dict[str, Any]]) -> dict[str, int]:
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    return {name: sum(each[name] for each in found) for name in names}


def test_usage_is_what_the_answers_say_by_adapter(client: httpx.Client) -> None:
    asked: list[tuple[str, str, dict[str, Any]]] = [
        (COMPLETIONS, "mlp", PROMPT),
        (COMPLETIONS, "mlp", PROMPT | {"n": 2, "prompt": ["a", "b"]}),
        (CHAT, "mlp", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}),
        ("/v1/rank", "queries", {"inputs": [{"prompt": "a", "choices": [" b", " c"]}]}),
        (COMPLETIONS, "tiny", PROMPT),
        (COMPLETIONS, "tiny", PROMPT | {"adapters": [{"name": "mlp"}, {"name": "queries"}]}),
    ]
    said: dict[str, list[dict[str, Any]]] = {}
    for path, model, body in asked:
        answer = client.post(path, json=body | {"model": model})
        assert answer.status_code == 200, answer.text
        named = "mixture" if "adapters" in body else model
        said.setdefault(named, []).append(answer.json()["usage"])

    found = {each["adapter"]: each for each in rows(client)}

    assert found.keys() == said.keys()
    for name, usages in said.items():
        row = found[name]
        assert row["requests"] == len(usages)
        for kind in ("prompt_tokens", "completion_tokens"):
            assert row[kind] == sum(each[kind] for each in usages)
        cached = [each["prompt_tokens_details"]["cached_tokens"] for each in usages]
        assert row["cached_tokens"] == sum(cached)
        assert row["seconds"] > 0
        assert row["key"] == ""


def test_cached_tokens_are_counted_as_such(client: httpx.Client) -> None:
    body = PROMPT | {"model": "mlp", "prompt": [5] * 200}
    answers = [client.post(COMPLETIONS, json=body).json()["usage"] for _ in range(2)]

    [row] = rows(client)
    cached = answers[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert (row["cached_tokens"], row["prompt_tokens"]) == (cached, 400)


def test_a_stream_counts_before_its_end_arrives(client: httpx.Client) -> None:
    body = PROMPT | {"model": "mlp", "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        list(response.iter_lines())

    assert sums(rows(client)) == {
        "requests": 1,
        "prompt_tokens": 20,
        "cached_tokens": 0,
        "completion_tokens": 4,
    }


def test_a_stream_whose_client_leaves_counts_with_its_tokens_so_far(client: httpx.Client) -> None:
    body = PROMPT | {"model": "mlp", "stream": True, "max_tokens": 200}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())

    assert eventually(lambda: len(rows(client)) == 1)
    [row] = rows(client)
    assert (row["requests"], row["prompt_tokens"]) == (1, 20)
    assert 1 <= row["completion_tokens"] < 200


def test_what_is_refused_or_fails_does_not_count(client: httpx.Client) -> None:
    assert client.post(COMPLETIONS, json=PROMPT | {"model": "nowhere"}).status_code == 404
    grammar = {"guided_grammar": "root ::= ("}
    assert client.post(COMPLETIONS, json=PROMPT | {"model": "mlp"} | grammar).status_code == 400

    assert rows(client) == []


def test_a_drain_that_cuts_an_answer_short_does_not_count_it(
    start_server: StartServer,
) -> None:
    url, services = start_server()
    body = PROMPT | {"model": "tiny", "max_tokens": 200}
    with ThreadPoolExecutor() as threads, httpx.Client(base_url=url, timeout=60) as client:
        answer = threads.submit(client.post, COMPLETIONS, json=body)
        assert eventually(lambda: services.engine.stats().running == 1)
        services.engine.stop(0.0)
        assert answer.result().status_code == 503
        assert rows(client) == []


# Periods, filters and forms


def test_rows_sum_up_hours_days_and_months(client: httpx.Client) -> None:
    begins = [_begins()]
    client.post(COMPLETIONS, json=PROMPT | {"model": "mlp"})
    begins.append(_begins())

    for period in ("hour", "day", "month"):
        [row] = rows(client, period=period)
        began = datetime.fromisoformat(row["start"])
        assert began in [each[period] for each in begins]


def _begins() -> dict[str, datetime]:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return {"hour": hour, "day": hour.replace(hour=0), "month": hour.replace(day=1, hour=0)}


def test_rows_are_of_the_time_key_and_adapter_that_were_asked_for(client: httpx.Client) -> None:
    for model in ("mlp", "queries"):
        client.post(COMPLETIONS, json=PROMPT | {"model": model})
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    assert [each["adapter"] for each in rows(client, adapter="mlp")] == ["mlp"]
    assert rows(client, adapter="ml") == rows(client, key="app") == []
    assert len(rows(client, key="")) == 2
    assert len(rows(client, start="2026-01-01", end=tomorrow)) == 2
    assert rows(client, start="2020-01-01", end="2020-01-02T03:00:00+02:00") == []


def test_a_report_says_which_hours_and_machines_it_covers(client: httpx.Client) -> None:
    query = {"start": "2026-11-01T10:30:00Z", "end": "2026-11-01T11:30:00Z"}
    report = client.get(USAGE, params=query).json()

    assert (report["start"], report["end"]) == ("2026-11-01T10:00:00Z", "2026-11-01T12:00:00Z")
    assert len(report["machines"]) == 1
    client.post(COMPLETIONS, json=PROMPT | {"model": "mlp"})
    assert {each["machine"] for each in rows(client)} == set(report["machines"])


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"start": "2026-11-02", "end": "2026-11-01"}, "not before"),
        ({"start": "yesterday"}, "start"),
        ({"start": "0001-01-01T00:00:00+23:59"}, "2000 to 2100"),
        ({"end": "9999-12-31T23:59:59-23:59"}, "2000 to 2100"),
        ({"period": "year"}, "period"),
        ({"format": "xml"}, "format"),
    ],
)
def test_a_wrong_query_is_refused(client: httpx.Client, query: dict[str, str], said: str) -> None:
    assert said in error_of(client.get(USAGE, params=query), 400)["message"]


def test_more_rows_than_an_answer_holds_are_refused(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infuse.server.api.usage.MOST_ROWS", 1)
    for model in ("mlp", "queries"):
        client.post(COMPLETIONS, json=PROMPT | {"model": model})

    assert error_of(client.get(USAGE), 400)["code"] == "too_many_rows"
    assert len(rows(client, adapter="mlp")) == 1


def test_the_csv_has_the_same_rows(client: httpx.Client) -> None:
    for model in ("mlp", "queries", "tiny"):
        client.post(COMPLETIONS, json=PROMPT | {"model": model})

    answer = client.get(USAGE, params={"format": "csv"})

    assert answer.headers["Content-Type"].startswith("text/csv")
    written = list(csv.DictReader(io.StringIO(answer.text)))
    assert written == [{k: str(v) for k, v in row.items()} for row in rows(client)]
    assert len(written) == 3


# Tenants


def test_a_tenant_sees_its_own_usage_alone(start_server: StartServer, tmp_path: Path) -> None:
    url, _ = start_server(keys_file=write_keys(tmp_path / "keys.json", KEYS))
    with httpx.Client(base_url=url) as client:
        for name, count in (("acme admin", 1), ("ops", 2)):
            with as_key(client, name) as tenant:
                for _ in range(count):
                    tenant.post(COMPLETIONS, json=PROMPT | {"model": "tiny"})
        with as_key(client, "acme admin") as tenant:
            own = rows(tenant)
            assert rows(tenant, key="acme admin") == own
            assert rows(tenant, key="ops") == rows(tenant, key="nobody") == []
            listed = tenant.get(USAGE, params={"format": "csv"}).text
        with as_key(client, "ops") as ops:
            all_rows = rows(ops)
        with as_key(client, "acme app") as generating:
            assert generating.get(USAGE).status_code == 403

    assert [(each["key"], each["requests"]) for each in own] == [("acme admin", 1)]
    assert "ops" not in listed
    assert [(each["key"], each["requests"]) for each in all_rows] == [("acme admin", 1), ("ops", 2)]


# Restarts, kills, and disks that fail


@contextmanager
def serving(model: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Within: a server in a process of its own, on this folder."""
    command = [INFUSE, "serve", "--port", "0", "--model", model, "--served-model-name", "tiny"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--adapters-dir", folder / "store"], stdout=output, stderr=output
        )
    try:
        with httpx.Client(base_url=address_of(process, log), timeout=60) as client:
            yield process, client
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.fault(
    "process",
    "The server is killed while answers arrive",
    by="SIGKILL at two moments",
    promise="Every answer that arrived whole is counted as used, once.",
)
@pytest.mark.native
def test_every_answer_that_arrived_whole_is_counted_whenever_the_server_is_killed(
    model_folder: Path, tmp_path: Path
) -> None:
    arrived: list[dict[str, int]] = []
    asked = 0
    for seconds in (0.0, 0.5):
        with serving(model_folder, tmp_path) as (process, client):
            killed = threading.Event()

            def ask(client: httpx.Client = client, killed: threading.Event = killed) -> int:
                sent = 0
                while not killed.is_set():
                    sent += 1
                    try:
                        answer = client.post(COMPLETIONS, json=PROMPT | {"model": "tiny"})
                        arrived.append(answer.json()["usage"])
                    except (httpx.TransportError, json.JSONDecodeError):
                        break
                return sent

            with ThreadPoolExecutor(4) as threads:
                asking = [threads.submit(ask) for _ in range(4)]
                before = len(arrived)
                assert eventually(lambda before=before: len(arrived) > before)
                time.sleep(seconds)
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed.set()
                asked += sum(each.result() for each in asking)

    with serving(model_folder, tmp_path) as (_, client):
        counted = sums(rows(client, period="month"))

    assert len(arrived) <= counted["requests"] <= asked
    assert counted["completion_tokens"] == 4 * counted["requests"]
    assert counted["prompt_tokens"] == 20 * counted["requests"]
