"""What a key is guaranteed, and what it may use at once: by its scope, over HTTP."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.api.test_auth import error_of
from tests.api.test_gateway_metrics import StartServer, choices_of
from tests.api.test_scopes import COMPLETIONS, KEYS, as_key, body, key_of, write_keys
from tests.api.test_streaming import eventually


def scoped(**scope: Any) -> dict[str, Any]:
    return {"roles": ["generate"], "scope": scope}


def test_requests_within_a_keys_guarantee_start_ahead_of_those_that_came_earlier(
    start_server: StartServer, tmp_path: Path
) -> None:
    """By its weight it would be the last."""
    keys = {
        "guaranteed": scoped(weight=0.01, guaranteed_tokens_per_minute=100_000),
        "plain": scoped(),
        "ops": KEYS["ops"],
    }
    url, services = start_server(
        keys_file=write_keys(tmp_path / "keys.json", keys), max_batch_rows=1
    )
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor() as threads:

        def ask(name: str) -> Any:
            asked = body(model="tiny", prompt="x")
            headers = {"Authorization": f"Bearer {key_of(name)}"}
            return threads.submit(client.post, COMPLETIONS, headers=headers, **asked)

        with choices_of(client, "tiny", Authorization=f"Bearer {key_of('ops')}"):
            before = services.engine.stats().waiting
            answers = []
            for number, name in enumerate(["plain"] * 4 + ["guaranteed"] * 4):
                answers.append(ask(name))
                assert eventually(lambda n=number: services.engine.stats().waiting > before + n)
        assert all(each.result().status_code == 200 for each in answers)
        with as_key(client, "ops") as ops:

            def waits() -> dict[str, list[float]]:
                slowest = ops.get("/debug/slowest", params={"limit": 100}).json()["data"]
                names = ("guaranteed", "plain")
                return {
                    name: [each["queue_seconds"] for each in slowest if each["key"] == name]
                    for name in names
                }

            assert eventually(lambda: sum(map(len, waits().values())) == 8)
            found = waits()

    assert max(found["guaranteed"]) <= sorted(found["plain"])[1], "one may run ahead on vLLM"


def test_a_burst_is_what_a_key_may_use_at_once_of_its_tokens_a_minute(
    start_server: StartServer, tmp_path: Path
) -> None:
    keys = {"limited": scoped(tokens_per_minute=60, burst_tokens=10)}
    url, _ = start_server(keys_file=write_keys(tmp_path / "keys.json", keys))
    with httpx.Client(base_url=url) as anybody, as_key(anybody, "limited") as client:
        first, refused = (
            client.post(COMPLETIONS, **body(model="tiny", prompt=[5] * 39)) for _ in range(2)
        )

    assert first.status_code == 200
    assert "60 tokens a minute, 10 at once" in error_of(refused, 429)["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 40
