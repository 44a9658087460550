"""Pages of other origins, and a proxy that has the server under a path of its own."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import run_by_modules, run_server
from tests.api.oracle import upload
from tests.api.test_auth import bearer, error_of, keys_file

APP, OTHER = "https://app.example.com", "https://other.example.com"
CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
ALLOWED, EXPOSED = "access-control-allow-origin", "access-control-expose-headers"


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with keys, for pages of APP, at the path /team/infuse of a proxy."""
    folder = tmp_path_factory.mktemp("browser")
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=folder / "store",
        keys_file=keys_file(folder / "keys.json"),
        cors_origins=f"{APP}, http://localhost:5173",
        root_path="/team/infuse",
    )
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with run_server(settings) as (url, _):
            yield url


def preflight(url: str, origin: str, method: str = "POST") -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    return httpx.options(url + CHAT, headers=headers)


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_a_browser_may_ask_for_a_known_origin_without_a_key(url: str, method: str) -> None:
    answer = preflight(url, APP, method)

    assert (answer.status_code, answer.headers[ALLOWED]) == (200, APP)
    assert method in answer.headers["access-control-allow-methods"]
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers


def test_a_page_of_a_known_origin_reads_answers_and_their_headers(url: str) -> None:
    headers = bearer("generate") | {"Origin": APP}
    answer = httpx.post(url + CHAT, json=BODY, headers=headers)
    with httpx.stream("POST", url + CHAT, json=BODY | {"stream": True}, headers=headers) as stream:
        stream.read()

    for each in (answer, stream):
        assert (each.status_code, each.headers[ALLOWED]) == (200, APP)
        assert {"Infuse-Adapter", "X-Request-Id"} <= set(each.headers[EXPOSED].split(", "))


def test_it_reads_errors_too_also_those_that_nobody_has_foreseen(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    headers = bearer("generate") | {"Origin": APP}
    unknown = httpx.post(url + CHAT, json=BODY | {"model": "nobody"}, headers=headers)
    no_key = httpx.post(url + CHAT, json=BODY, headers={"Origin": APP})
    monkeypatch.setattr("infuse.server.api.completion_writer.CompletionWriter.whole", fail)
    body = {"model": "tiny", "prompt": "A", "max_tokens": 1}
    unforeseen = httpx.post(f"{url}/v1/completions", json=body, headers=headers)

    for answer, status in ((unknown, 404), (no_key, 401), (unforeseen, 500)):
        assert error_of(answer, status)
        assert answer.headers[ALLOWED] == APP


def test_a_page_of_another_origin_reads_nothing(url: str) -> None:
    answer = httpx.get(f"{url}/health/live", headers={"Origin": OTHER})

    assert preflight(url, OTHER).status_code == 400
    assert ALLOWED not in answer.headers
    assert ALLOWED not in preflight(url, OTHER).headers


def test_without_the_setting_no_other_origin_reads_anything(client: httpx.Client) -> None:
    url = str(client.base_url).rstrip("/")

    assert error_of(preflight(url, APP), 405)
    assert ALLOWED not in client.get("/v1/models", headers={"Origin": APP}).headers


@pytest.mark.parametrize("prefix", ["", "/team/infuse"])
def test_it_does_not_matter_whether_the_proxy_removes_its_path(url: str, prefix: str) -> None:
    answer = httpx.post(f"{url}{prefix}{CHAT}", json=BODY, headers=bearer("generate"))

    assert answer.status_code == 200
    assert httpx.get(f"{url}{prefix}/health/ready").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/team/infuse/v1/adapters",
        "/team/infuse/team/infuse/v1/adapters",
        "/team/infuse//v1/adapters",
        "/team//infuse/v1/adapters",
        "/team/infusev1/adapters",
    ],
)
def test_no_spelling_of_the_path_leads_around_the_roles_of_keys(url: str, path: str) -> None:
    assert httpx.get(url + path, headers=bearer("generate")).status_code in (403, 404)


def test_what_the_server_names_lies_under_the_path(
    url: str, adapter_folders: dict[str, Path]
) -> None:
    page = httpx.get(f"{url}/docs").text
    document = httpx.get(f"{url}/openapi.json").json()
    with httpx.Client(base_url=url, headers=bearer("admin")) as admin:
        added = upload(admin, "placed", adapter_folders["default"])

    assert "'/team/infuse/openapi.json'" in page
    assert 'src="/team/infuse/docs/files/swagger-ui-bundle.js"' in page
    assert document["servers"] == [{"url": "/team/infuse"}]
    assert added.headers["Location"] == "/team/infuse/v1/adapters/placed"
