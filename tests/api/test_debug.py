"""`GET /debug/batch`: what runs and waits, by whom, and where its time goes."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_adapters import PROMPT
from tests.api.test_gateway_metrics import StartServer, choices_of
from tests.api.test_streaming import eventually

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
        assert client.get("/debug/batch", headers=APP).status_code == 403
        assert client.get("/debug/batch").status_code == 401
