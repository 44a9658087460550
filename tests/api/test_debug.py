"""`GET /debug/…`: what runs and waits, by whom, for what, and where the time of answers went."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.observability.access import EndedRequest
from infuse.server.observability.answered import Answered
from infuse.server.observability.latest import LatestAnswers
from infuse.server.request_id import HEADER as REQUEST
from tests.api.test_adapters import PROMPT
from tests.api.test_gateway_metrics import StartServer, choices_of
from tests.api.test_streaming import COMPLETIONS, eventually

KEYS = [
    {"name": "app", "key": "generates-and-no-more", "roles": ["generate"]},
    {"name": "ops", "key": "administers-adapters", "roles": ["admin"]},
]
APP, OPS = ({"Authorization": f"Bearer {key['key']}"} for key in KEYS)


def batch(client: httpx.Client) -> dict[str, Any]:
    response = client.get("/debug/batch", headers=OPS)
    assert response.status_code == 200
    return dict(response.json())


@pytest.mark.native
def test_the_batch_shows_who_runs_and_waits_and_what_the_slots_hold(
    start_server: StartServer, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(KEYS))
    url, _ = start_server(
        max_batch_rows=1,
        keys_file=tmp_path / "keys.json",
        preload_adapters=adapter_folders["mlp"].parent,
    )
    with httpx.Client(base_url=url, timeout=60) as client:
        with choices_of(client, "queries", **APP, **{"X-Request-Id": "mine"}):
            seen: list[dict[str, Any]] = []

            def decodes() -> bool:
                seen.append(batch(client))
                return any(each["completion_tokens"] for each in seen[-1]["running"])

            assert eventually(decodes)
        assert eventually(lambda: not batch(client)["running"])
        idle = batch(client)

    busy = seen[-1]
    [running] = busy["running"]
    assert (running["key"], running["adapter"]) == ("app", "queries@1")
    assert running["request_id"] == "mine"
    assert running["prompt_tokens"] == len(PROMPT["prompt"])
    times = [running[f"{part}_seconds"] for part in ("queue", "prefill", "decode")]
    assert all(each >= 0 for each in times)
    assert busy["waiting"]
    assert not any(each["preempted"] for each in busy["waiting"])
    assert {each["prefill_seconds"] for each in busy["waiting"]} == {0}
    assert {each["waits_for"] for each in busy["waiting"]} == {"row"}
    assert running["waits_for"] is None
    [slot] = busy["slots"]
    assert (slot["adapter"], slot["running"], slot["pinned"]) == ("queries@1", 1, False)
    assert 1 <= slot["leases"] <= 40
    assert busy["batch_rows"] == 1
    assert (idle["waiting"], idle["kv_tokens_used"]) == ([], 0)
    assert idle["slots"][0] | {"leases": 0, "running": 0} == idle["slots"][0]


def test_a_key_that_only_generates_does_not_see_the_batch(
    start_server: StartServer, tmp_path: Path
) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(KEYS))
    url, _ = start_server(keys_file=tmp_path / "keys.json")

    with httpx.Client(base_url=url, timeout=60) as client:
        for path in ("/debug/batch", "/debug/slowest"):
            assert client.get(path, headers=APP).status_code == 403
            assert client.get(path).status_code == 401


def test_a_request_whose_adapter_finds_no_slot_says_so_now_and_afterwards(
    start_server: StartServer, adapter_folders: dict[str, Path]
) -> None:
    url, _ = start_server(
        max_resident_adapters=1, preload_adapters=adapter_folders["mlp"].parent, max_batch_rows=64
    )
    late = PROMPT | {"model": "mlp"}
    with ThreadPoolExecutor() as threads, httpx.Client(base_url=url, timeout=60) as client:
        with choices_of(client, "queries"):
            assert eventually(lambda: len(batch(client)["running"]) > 0)
            waiting = threads.submit(client.post, COMPLETIONS, json=late, headers={REQUEST: "late"})
            assert eventually(
                lambda: [each["waits_for"] for each in batch(client)["waiting"]] == ["slot"]
            )
        assert waiting.result().status_code == 200
        assert eventually(lambda: slow(client, "late") is not None)
        ended = slow(client, "late")

    assert ended is not None
    assert ended["slot_seconds"] > 0
    assert ended["adapter"] == "mlp@1"


@pytest.mark.parametrize("limit", [0, 1001])
def test_a_wrong_limit_is_refused(client: httpx.Client, limit: int) -> None:
    assert client.get("/debug/slowest", params={"limit": limit}).status_code == 400


def test_a_request_whose_grammar_is_compiled_is_seen_to_wait_for_it(
    start_server: StartServer,
) -> None:
    url, _ = start_server()
    slow_schema = {"type": "integer", "multipleOf": 1_000_003}
    body = PROMPT | {"model": "tiny", "structured_outputs": {"json": slow_schema}}

    async def seen() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            asked = asyncio.create_task(
                client.post(COMPLETIONS, json=body, headers={REQUEST: "mine"})
            )
            preparing: list[dict[str, Any]] = []
            while not asked.done() and not any(each["waits_for"] for each in preparing):
                preparing = (await client.get("/debug/batch")).json()["preparing"]
            asked.cancel()
            return preparing

    [preparing] = asyncio.run(seen())

    assert (preparing["request_id"], preparing["waits_for"]) == ("mine", "grammar")
    assert preparing["seconds"] > 0
    with httpx.Client(base_url=url) as client:
        assert eventually(lambda: batch(client)["preparing"] == [])


def slow(client: httpx.Client, request_id: str) -> dict[str, Any] | None:
    """What is said of an answer; None where it is not known yet."""
    found = client.get("/debug/slowest", params={"limit": 1000}, headers=OPS).json()["data"]
    return next((each for each in found if each["request_id"] == request_id), None)


def test_the_slowest_answers_come_first_with_where_their_time_went(
    start_server: StartServer, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "keys.json").write_text(json.dumps(KEYS))
    url, _ = start_server(
        keys_file=tmp_path / "keys.json", preload_adapters=adapter_folders["mlp"].parent
    )
    with httpx.Client(base_url=url, timeout=60) as client:
        for model, tokens in (("tiny", 2), ("mlp", 200), ("tiny", 2)):
            body = PROMPT | {"model": model, "max_tokens": tokens}
            answer = client.post(COMPLETIONS, json=body, headers=APP)
            assert answer.status_code == 200
        client.post(COMPLETIONS, json=PROMPT | {"model": "nowhere"}, headers=APP)
        assert eventually(lambda: slow(client, answer.headers[REQUEST]) is not None)
        report = client.get("/debug/slowest", params={"limit": 2}, headers=OPS).json()

    assert (report["of"], len(report["data"])) == (3, 2)
    first, second = report["data"]
    assert first["seconds"] >= second["seconds"]
    assert (first["key"], first["adapter"], first["route"]) == ("app", "mlp@1", COMPLETIONS)
    assert (first["completion_tokens"], first["finish"], first["status"]) == (200, ["length"], 200)
    for each in report["data"]:
        parts = ("prepare", "queue", "slot", "prefill", "decode", "sending")
        total = sum(each[f"{part}_seconds"] for part in parts)
        assert total == pytest.approx(each["seconds"], abs=0.001)
        assert all(each[f"{part}_seconds"] >= 0 for part in parts)


def test_of_many_answers_the_latest_are_compared() -> None:
    latest = LatestAnswers()
    for number in range(1100):
        latest.tell(ended(seconds=float(1100 - number)))
    latest.tell(replace(ended(seconds=9999.0), answered=None))

    assert len(latest) == 1000
    assert [each.ended for each in latest.slowest(2)] == [1000.0, 999.0]


def ended(seconds: float) -> EndedRequest:
    """A request that took so long."""
    answered = Answered(
        id="cmpl-1",
        model="tiny",
        adapter=None,
        fingerprint="tiny",
        submitted=0.0,
        prompt_tokens=1,
        cached_tokens=0,
        completion_tokens=1,
        choices=(),
    )
    return EndedRequest(
        id="1",
        method="POST",
        path=COMPLETIONS,
        route=COMPLETIONS,
        status=200,
        started=0.0,
        ended=seconds,
        client=None,
        key=None,
        trace_context={},
        answered=answered,
    )
