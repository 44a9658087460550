"""What the log says of each request, and the id that a request has."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import RunningServer
from tests.api.test_adapters import PROMPT, complete
from tests.api.test_streaming import CHAT, COMPLETIONS, eventually
from tests.served import served_by
from tests.test_listener import INFUSE

Lines = Callable[[], list[dict[str, Any]]]
KEYS = [
    {"name": "app", "key": "generates-and-no-more", "roles": ["generate"]},
    {"name": 'a "b"', "key": "administers-adapters", "roles": ["admin"]},
]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The fields of each line of a request so far, in order."""
    caplog.set_level(logging.INFO, "infuse.server.observability.access")

    def lines() -> list[dict[str, Any]]:
        return [
            vars(each)
            for each in caplog.records
            if each.name == "infuse.server.observability.access"
        ]

    return lines


def only(lines: Lines) -> dict[str, Any]:
    """The line of the one request; it may be written after its answer has been read."""
    assert eventually(lambda: len(lines()) > 0)
    [line] = lines()
    return line


@pytest.mark.parametrize("id_", ["abc", "4bf92f35-77b3/a.b:c_d+e=@", "x" * 128])
def test_a_plain_request_id_is_sent_back(client: httpx.Client, id_: str) -> None:
    response = client.get("/v1/models", headers={"X-Request-Id": id_})

    assert response.headers.get_list("x-request-id") == [id_]


@pytest.mark.parametrize("id_", ["", "x" * 129, "a b", 'a"', "a;b", "a\tb", "é"])
def test_any_other_request_id_is_replaced(client: httpx.Client, id_: str) -> None:
    headers = {"X-Request-Id": id_.encode()} if id_ else {}
    ids = [client.get("/v1/models", headers=headers).headers["x-request-id"] for _ in range(2)]

    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)
    assert ids[0] != ids[1]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("POST", COMPLETIONS, 400), ("HEAD", "/health/live", 200)],
)
def test_every_answer_has_its_id(client: httpx.Client, method: str, path: str, status: int) -> None:
    response = client.request(method, path, headers={"X-Request-Id": "mine"})

    assert (response.status_code, response.headers["x-request-id"]) == (status, "mine")


def test_the_answer_of_a_server_that_fails_has_its_id_and_so_has_the_log(
    client: httpx.Client, server: RunningServer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Mock(side_effect=RuntimeError("broken"))
    monkeypatch.setattr(server.services.metrics, "expose", broken)
    response = client.get("/metrics", headers={"X-Request-Id": "mine"})

    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert only(lines)["status"] == 500


def test_a_line_says_what_was_asked_of_which_revision_and_how_long_it_took(
    client: httpx.Client, lines: Lines
) -> None:
    answer = complete(client, "mlp").json()

    line = only(lines)
    assert line["levelname"] == "INFO"
    assert (line["method"], line["path"], line["status"]) == ("POST", COMPLETIONS, 200)
    assert (line["route"], line["client"]) == (COMPLETIONS, "127.0.0.1")
    assert (line["adapter"], line["answer"]) == ("mlp@1", answer["id"])
    assert (line["prompt_tokens"], line["completion_tokens"]) == (len(PROMPT["prompt"]), 8)
    assert line["finish"] == "length"
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert "key" not in line


def test_a_line_of_the_base_names_no_adapter(client: httpx.Client, lines: Lines) -> None:
    complete(client, "tiny")

    assert "adapter" not in only(lines)


def test_a_stream_has_one_line_at_its_end(client: httpx.Client, lines: Lines) -> None:
    body = {"model": "mlp", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    with client.stream("POST", CHAT, json=body | {"stream": True, "ignore_eos": True}) as response:
        list(response.iter_lines())

    line = only(lines)
    assert (line["status"], line["completion_tokens"], line["finish"]) == (200, 3, "length")


def test_a_stream_whose_client_leaves_says_so(client: httpx.Client, lines: Lines) -> None:
    body = PROMPT | {"model": "mlp", "max_tokens": 200, "stream": True}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        next(response.iter_lines())

    assert only(lines)["finish"] == "cancelled"


def test_scrapes_and_probes_have_no_line(client: httpx.Client, lines: Lines) -> None:
    for path in ("/metrics", "/health/live", "/health/ready"):
        assert client.get(path).status_code == 200
    client.get("/v1/models")

    assert only(lines)["path"] == "/v1/models"


def test_scrapes_and_probes_have_a_line_where_one_asks_for_it(
    client: httpx.Client, lines: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "infuse.server.observability.access")
    assert client.get("/metrics").status_code == 200

    line = only(lines)
    assert (line["levelname"], line["path"]) == ("DEBUG", "/metrics")


def test_a_scrape_or_probe_that_fails_has_one(
    client: httpx.Client, server: RunningServer, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = Mock(alive=False, ready=False)
    monkeypatch.setattr(server.services.engine, "stats", Mock(return_value=stopped))

    assert client.get("/health/live").status_code == 503

    line = only(lines)
    assert (line["levelname"], line["path"], line["status"]) == ("WARNING", "/health/live", 503)


def test_a_path_is_logged_without_its_query_on_one_line(client: httpx.Client, lines: Lines) -> None:
    client.get("/v1/models/a%0Ab%22c?key=secret")

    assert only(lines)["path"] == "/v1/models/a%0Ab%22c"


def test_a_servers_log_is_json_throughout_and_holds_no_key(
    model_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    keys_file = tmp_path / "keys.json"
    keys_file.write_text(json.dumps(KEYS))
    keys_file.chmod(0o644)
    command = [INFUSE, "serve", "--port", "0", "--model", model_folder]
    command += ["--served-model-name", "tiny", "--adapters-dir", tmp_path / "store"]
    command += ["--preload-adapters", adapter_folders["mlp"].parent, "--keys-file", keys_file]
    command += ["--log-level", "debug", "--log-format", "json"]
    wrong = "guessed-and-not-a-key"

    with (
        served_by(list(map(str, command)), tmp_path / "log") as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        for key in (wrong, *(each["key"] for each in KEYS)):
            client.headers["Authorization"] = f"Bearer {key}"
            client.get("/v1/adapters", params={"api_key": key})
            complete(client, "mlp")
            client.post(COMPLETIONS, content=key)
            client.get(f"/v1/models/nobody#{key}")

    log = (tmp_path / "log").read_text()
    # vLLM's processes write lines of their own.
    ours = [line for line in log.splitlines() if Settings().engine == "native" or line[:1] == "{"]
    lines = [json.loads(line) for line in ours]
    assert {line.get("key") for line in lines} == {None, "app", 'a "b"'}
    assert any(line["logger"].startswith("uvicorn") for line in lines)
    for key in (wrong, *(each["key"] for each in KEYS)):
        assert key not in log
