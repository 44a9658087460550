"""API keys: what each may do, decided before a body is read."""

import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.engine import GenerationRequest
from infuse.server.keys.key_file import BadKeysFile, read_keys
from infuse.server.services import Services
from infuse.server.settings import Settings
from tests.api.archives import form_of, read_adapter
from tests.api.conftest import run_server
from tests.api.test_adapters import ADAPTERS, PROMPT

KEYS = {
    "everything": ["generate", "admin"],
    "generate": ["generate"],
    "admin": ["admin"],
    "metrics": ["metrics"],
}
COMPLETION = {"json": PROMPT | {"model": "tiny"}}
GENERATE: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/completions", COMPLETION),
    ("POST", "/v1/chat/completions", {"json": {"model": "tiny", "messages": []}}),
    ("POST", "/v1/responses", {"json": {"model": "tiny", "input": []}}),
    ("GET", "/v1/models", {}),
    ("GET", "/v1/models/tiny", {}),
    ("POST", "/tokenize", {"json": {"prompt": "a"}}),
    ("POST", "/detokenize", {"json": {"tokens": [5]}}),
    ("GET", "/tokenizer_info", {}),
    ("POST", "/v1/embeddings", {"json": {}}),
]
ADMIN: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/debug/batch", {}),
    ("GET", "/debug/slowest", {}),
    ("GET", "/v1/usage", {}),
    ("GET", ADAPTERS, {}),
    ("POST", ADAPTERS, {}),
    ("POST", f"{ADAPTERS}?dry_run=true", {}),
    ("PUT", f"{ADAPTERS}/unknown", {"json": {"source": "hf://org/name"}}),
    ("GET", f"{ADAPTERS}/unknown", {}),
    ("PUT", f"{ADAPTERS}/unknown", {}),
    ("GET", f"{ADAPTERS}/unknown/vectors", {}),
    ("DELETE", f"{ADAPTERS}/unknown", {}),
    ("GET", f"{ADAPTERS}/unknown/files/adapter_config.json", {}),
    ("GET", "/v1/merges", {}),
    ("POST", "/v1/merges", {"json": {}}),
    ("GET", "/v1/merges/unknown", {}),
    ("GET", "/v1/merges/unknown/archive", {}),
    ("DELETE", "/v1/merges/unknown", {}),
]
OPEN = ["/health/live", "/health/ready", "/docs", "/openapi.json"]


def key_of(role: str) -> str:
    return f"{role}-key-of-this-test"


def bearer(role: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(role)}"}


def keys_file(path: Path) -> Path:
    keys = [{"name": name, "key": key_of(name), "roles": roles} for name, roles in KEYS.items()]
    path.write_text(json.dumps(keys))
    return path


@pytest.fixture(scope="module")
def guarded(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Services]]:
    folder = tmp_path_factory.mktemp("guarded")
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=folder / "store",
        keys_file=keys_file(folder / "keys.json"),
        log_level="debug",
    )
    with run_server(settings) as running:
        yield running


@pytest.fixture
def client(guarded: tuple[str, Services]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded[0], timeout=60) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])


# Without a key


@pytest.mark.parametrize(("method", "path", "body"), [*GENERATE, *ADMIN, ("GET", "/metrics", {})])
def test_nothing_is_done_without_a_key(
    client: httpx.Client, method: str, path: str, body: dict[str, Any]
) -> None:
    response = client.request(method, path, **body)

    error = error_of(response, 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


OTHER_FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/messages", {"json": {"model": "tiny", "messages": [], "max_tokens": 1}}),
    ("POST", "/v1/messages/count_tokens", {"json": {"model": "tiny", "messages": []}}),
    ("POST", "/api/chat", {"json": {"model": "tiny"}}),
    ("POST", "/api/generate", {"json": {"model": "tiny"}}),
    ("POST", "/api/show", {"json": {"model": "tiny"}}),
    ("GET", "/api/tags", {}),
    ("GET", "/api/ps", {}),
    ("GET", "/api/version", {}),
    ("POST", "/api/pull", {}),
]


@pytest.mark.parametrize(("method", "path", "body"), OTHER_FORMS)
def test_nothing_is_done_without_a_key_over_the_apis_of_others(
    client: httpx.Client, method: str, path: str, body: dict[str, Any]
) -> None:
    unknown = client.request(method, path, **body)
    wrong = client.request(method, path, **body, headers=bearer("admin"))

    assert (unknown.status_code, wrong.status_code) == (401, 403)
    assert unknown.headers["www-authenticate"] == "Bearer"
    if path.startswith("/v1/"):
        assert unknown.json()["error"]["type"] == "authentication_error"
        assert wrong.json()["error"]["type"] == "permission_error"
    else:
        assert "x-api-key" in unknown.json()["error"]
        assert "lacks the role 'generate'" in wrong.json()["error"]
    allowed = client.request(method, path, **body, headers={"x-api-key": key_of("generate")})
    assert allowed.status_code in (200, 400)


@pytest.mark.parametrize(("method", "path", "body"), [*GENERATE, *ADMIN, ("GET", "/metrics", {})])
def test_a_key_may_come_in_anthropics_header(
    client: httpx.Client, method: str, path: str, body: dict[str, Any]
) -> None:
    statuses = [
        client.request(method, path, headers=headers, **body).status_code
        for headers in (bearer("everything"), {"x-api-key": key_of("everything")})
    ]

    assert statuses[0] == statuses[1] not in (401, 403)
    wrong = client.request(method, path, headers={"x-api-key": "wrong"}, **body)
    assert error_of(wrong, 401)["code"] == "invalid_api_key"


def test_a_bearer_counts_before_anthropics_header(client: httpx.Client) -> None:
    both = {"Authorization": "Bearer wrong", "x-api-key": key_of("everything")}
    other = {"Authorization": "Basic eA==", "x-api-key": key_of("everything")}

    assert client.get("/v1/models", headers=both).status_code == 401
    assert client.get("/v1/models", headers=other).status_code == 200


@pytest.mark.parametrize("role", ["generate", "admin"])
def test_any_key_that_may_ask_is_told_how_adapters_come(client: httpx.Client, role: str) -> None:
    answer = client.post("/v1/load_lora_adapter", json={"lora_name": "a"}, headers=bearer(role))

    assert "PUT /v1/adapters/{name}" in error_of(answer, 400)["message"]


def test_a_path_that_only_begins_like_an_open_one_is_not_open(client: httpx.Client) -> None:
    for path in ("/healthy", "/docs-of-mine", "/openapi.json5"):
        assert client.get(path, headers={"Authorization": ""}).status_code == 401


@pytest.mark.parametrize("path", OPEN)
def test_health_and_the_documentation_are_open(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json"])
def test_the_documentation_needs_a_key_where_that_is_set(
    start_server: Callable[..., tuple[str, Services]], tmp_path: Path, path: str
) -> None:
    url, _ = start_server(keys_file=keys_file(tmp_path / "keys.json"), open_docs=False)

    assert httpx.get(url + path).status_code == 401
    assert {httpx.get(url + path, headers=bearer(role)).status_code for role in KEYS} == {200}
    assert httpx.get(f"{url}/health/live").status_code == 200


def test_even_what_does_not_exist_needs_a_key(client: httpx.Client) -> None:
    assert client.get("/v1/secret").status_code == 401
    assert client.get("/v1/secret", headers=bearer("generate")).status_code == 404


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer wrong",
        f"Bearer {key_of('everything')}x",
        f"Bearer {key_of('everything')[:-1]}",
        f"Basic {key_of('everything')}",
        key_of("everything"),
        f"Bearer x {key_of('everything')}",
        "Bearer \xff\xfe",
    ],
)
def test_a_wrong_key_opens_nothing(client: httpx.Client, header: str) -> None:
    headers = {"Authorization": header.encode("latin-1")}

    assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_key_opens(client: httpx.Client, scheme: str) -> None:
    headers = {"Authorization": f"{scheme} {key_of('everything')}"}

    assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("expect", ["", "Expect: 100-continue\r\n"])
@pytest.mark.parametrize("length", ["Content-Length: 60000000", "Transfer-Encoding: chunked"])
def test_a_key_is_asked_for_before_the_body(
    guarded: tuple[str, Services], expect: str, length: str
) -> None:
    url = httpx.URL(guarded[0])
    head = f"POST {ADAPTERS} HTTP/1.1\r\nHost: x\r\n{length}\r\n{expect}"
    kind = "Content-Type: multipart/form-data; boundary=x\r\n\r\n"

    with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
        connection.sendall((head + kind).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401 ")


def test_an_upload_without_a_key_leaves_nothing(
    client: httpx.Client, guarded: tuple[str, Services], adapter_folders: dict[str, Path]
) -> None:
    form = form_of(read_adapter(adapter_folders["mlp"]))

    assert client.post(ADAPTERS, data={"name": "mlp"}, files=form).status_code == 401
    refused = client.post(ADAPTERS, data={"name": "a"}, files=form, headers=bearer("generate"))
    assert refused.status_code == 403
    assert guarded[1].registry.stored.names() == []


# Roles


@pytest.mark.parametrize(("method", "path", "body"), GENERATE)
@pytest.mark.parametrize("role", ["admin", "metrics"])
def test_only_a_key_that_may_generate_generates(
    client: httpx.Client, method: str, path: str, body: dict[str, Any], role: str
) -> None:
    refused = client.request(method, path, **body, headers=bearer(role))
    allowed = client.request(method, path, **body, headers=bearer("generate"))

    error = error_of(refused, 403)
    assert (error["type"], error["code"]) == ("permission_error", "missing_role")
    assert "'generate'" in error["message"]
    assert f"'{role}'" in error["message"]
    assert allowed.status_code not in (401, 403)


@pytest.mark.parametrize(("method", "path", "body"), ADMIN)
@pytest.mark.parametrize("role", ["generate", "metrics"])
def test_only_a_key_that_may_administer_administers(
    client: httpx.Client, method: str, path: str, body: dict[str, Any], role: str
) -> None:
    refused = client.request(method, path, **body, headers=bearer(role))
    allowed = client.request(method, path, **body, headers=bearer("admin"))

    assert "'admin'" in error_of(refused, 403)["message"]
    assert allowed.status_code not in (401, 403)


@pytest.mark.parametrize(
    "path", ["/v1//adapters", "/V1/adapters", "/v1/adapters/", "/./v1/adapters"]
)
def test_no_other_spelling_of_a_path_is_a_way_in(client: httpx.Client, path: str) -> None:
    response = client.get(path, headers=bearer("generate"), follow_redirects=True)

    assert response.status_code in (403, 404)


@pytest.mark.parametrize("role", KEYS)
def test_the_metrics_of_all_keys_requests_are_not_for_a_key_that_only_generates(
    client: httpx.Client, role: str
) -> None:
    status = client.get("/metrics", headers=bearer(role)).status_code

    assert status == (403 if role == "generate" else 200)


def test_a_key_for_everything_does_everything(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    client.headers.update(bearer("everything"))
    form = form_of(read_adapter(adapter_folders["mlp"]))

    assert client.post(ADAPTERS, data={"name": "mlp"}, files=form).status_code == 201
    assert client.post("/v1/completions", json=PROMPT | {"model": "mlp"}).status_code == 200
    assert client.delete(f"{ADAPTERS}/mlp").status_code == 204


@pytest.mark.parametrize("role", ["everything", "metrics", "no key"])
@pytest.mark.parametrize(
    ("method", "path", "body"), [*GENERATE, *ADMIN, *(("GET", path, {}) for path in OPEN)]
)
def test_no_answer_is_kept_on_its_way_or_taken_for_something_else(
    client: httpx.Client, method: str, path: str, body: dict[str, Any], role: str
) -> None:
    answer = client.request(method, path, **body, headers=bearer(role))

    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert answer.headers.get_list("x-content-type-options") == ["nosniff"]


def test_no_stream_is_kept_on_its_way(client: httpx.Client) -> None:
    body = PROMPT | {"model": "tiny", "stream": True, "max_tokens": 1}

    answer = client.post("/v1/completions", json=body, headers=bearer("generate"))

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers.get_list("cache-control") == ["no-store"]


def test_no_key_is_logged_or_shown(
    client: httpx.Client, guarded: tuple[str, Services], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for role in KEYS:
        for method, path, body in [*GENERATE, *ADMIN]:
            answer = client.request(method, path, **body, headers=bearer(role))
            assert "-key-of-this-test" not in answer.text + str(answer.headers)

    assert "-key-of-this-test" not in caplog.text + repr(guarded[1])


# The keys file


GOOD = {"name": "ci", "key": "0123456789abcdef", "roles": ["admin"]}
BAD_FILES: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "the file: Invalid JSON"),
    "empty": ("", "the file: Invalid JSON"),
    "no list": ({}, "the file: Input should be a valid array"),
    "no keys": ([], "holds no key"),
    "no name": ([GOOD | {"name": ""}], "0.name"),
    "short": ([GOOD, GOOD | {"key": "secret"}], "1.key"),
    "no key": ([{"name": "ci", "roles": ["admin"]}], "0: a key has an id and a hash"),
    "no roles": ([GOOD | {"roles": []}], "0.roles"),
    "unknown role": ([GOOD | {"roles": ["root"]}], "0.roles"),
    "unknown field": ([GOOD | {"rolls": []}], "0.rolls"),
}


@pytest.mark.parametrize(("content", "problem"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_keys_file_is_refused_with_the_place_and_without_its_keys(
    tmp_path: Path, content: Any, problem: str
) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(BadKeysFile) as caught:
        read_keys(path)

    message = str(caught.value)
    assert str(path) in message
    assert problem in message
    assert "secret" not in message
    assert "0123456789abcdef" not in message
    assert "\n" not in message


def test_a_keys_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKeysFile, match="cannot be read: Is a directory"):
        read_keys(tmp_path)


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o644, True)])
def test_a_keys_file_that_everybody_reads_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = keys_file(tmp_path / "keys.json")
    path.chmod(mode)

    read_keys(path)

    assert ("can be read by every user" in caplog.text) is warned


def test_without_keys_everybody_may_do_everything(
    start_server: Callable[..., tuple[str, Services]],
) -> None:
    url, _ = start_server()

    assert httpx.get(url + ADAPTERS).status_code == 200
    assert httpx.post(url + "/v1/completions", **COMPLETION).status_code == 200


# Whose share of the model a request uses


def test_a_request_is_charged_to_its_key(
    guarded: tuple[str, Services], client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tenants = guarded[1].engine, []
    submit = engine.submit

    def noting(*requests: GenerationRequest) -> None:
        tenants.extend(request.tenant for request in requests)
        submit(*requests)

    monkeypatch.setattr(engine, "submit", noting)
    body = {"model": "tiny", "max_tokens": 1}
    chat = body | {"messages": [{"role": "user", "content": "Hi"}]}
    ranking = {"model": "tiny", "inputs": [{"prompt": "a", "choices": [" b"]}]}
    for path, json_body in (
        ("/v1/completions", PROMPT | body),
        ("/v1/chat/completions", chat),
        ("/v1/responses", {"model": "tiny", "max_output_tokens": 1, "input": "Hi"}),
        ("/v1/rank", ranking),
    ):
        for key in ("everything", "generate"):
            answer = client.post(path, headers=bearer(key), json=json_body)
            assert answer.status_code == 200, answer.text

    assert tenants == ["everything", "generate"] * 4


# What a key can learn of another


SECRET = "Our offer to the customer is 4 711 euros, and not a cent less than that."


def cached(client: httpx.Client, role: str, path: str, model: str, salt: str | None) -> int:
    """How many cached tokens of the secret prompt the server reports to this key."""
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "cache_salt": salt}
    if path == "/v1/chat/completions":
        body["messages"] = [{"role": "user", "content": SECRET}]
    else:
        body["prompt"] = SECRET
    answer = client.post(path, json=body, headers=bearer(role))
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("model", ["tiny", "default"])
@pytest.mark.parametrize("salt", [None, "ours"])
def test_a_key_is_not_told_what_another_has_asked(
    client: httpx.Client,
    guarded: tuple[str, Services],
    adapter_folders: dict[str, Path],
    path: str,
    model: str,
    salt: str | None,
) -> None:
    if "default" not in guarded[1].registry.stored:
        files = form_of(read_adapter(adapter_folders["default"]))
        client.post(ADAPTERS, data={"name": "default"}, files=files, headers=bearer("admin"))
    cached(client, "everything", path, model, salt)
    before = guarded[1].engine.stats().prompt_tokens

    assert cached(client, "generate", path, model, salt) == 0
    assert guarded[1].engine.stats().prompt_tokens - before >= len(SECRET), "it is all computed"
    assert cached(client, "generate", path, model, salt) > 32
    assert cached(client, "generate", path, model, f"not {salt}") == 0


def test_keys_that_trust_each_other_share_what_was_computed(
    model_folder: Path, tmp_path: Path
) -> None:
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=tmp_path / "store",
        keys_file=keys_file(tmp_path / "keys.json"),
        keys_share_caches=True,
    )
    with run_server(settings) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        cached(client, "everything", "/v1/completions", "tiny", None)

        assert cached(client, "generate", "/v1/completions", "tiny", None) > 32
        assert cached(client, "generate", "/v1/completions", "tiny", "ours") == 0
