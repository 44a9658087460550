"""Adapters that the server fetches from where they were published, over HTTP."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.adapters.errors import SourceError
from infuse.server.errors import SOURCE_ERRORS
from infuse.server.services import Services
from tests.api.archives import CONFIG, WEIGHTS
from tests.api.conftest import RunningServer, ServeAdapters
from tests.api.test_adapters import ADAPTERS, complete, stored
from tests.api.test_uploads import Files, torch_saved
from tests.api.test_uploads import alone as alone
from tests.api.test_uploads import files as files
from tests.api.test_uploads import (
    nothing_stays_and_nobody_is_disturbed as nothing_stays_and_nobody_is_disturbed,
)
from tests.publishers import (
    BUCKET,
    HUB_TOKEN,
    Hub,
    Talk,
    hangs,
    never_ends,
    rude_server,
    says,
    use_bucket_endpoint,
)
from tests.publishers import bucket as bucket
from tests.publishers import hub as hub

refused = pytest.mark.usefixtures("nothing_stays_and_nobody_is_disturbed")
LIMIT = 1 << 20
SOURCE = "hf://org/name"


@pytest.fixture(scope="module")
def server(
    serve_adapters: ServeAdapters, adapter_folders: dict[str, Path]
) -> Iterator[RunningServer]:
    prefixes = f"hf://org/,s3://{BUCKET},file://{adapter_folders['mlp'].parent}"
    with serve_adapters(max_upload_bytes=LIMIT, source_prefixes=prefixes) as server:
        yield server


@pytest.fixture(autouse=True)
def _only_the_preloaded_stay(server: RunningServer) -> Iterator[None]:
    yield
    for name in set(server.services.registry.stored.names()) - server.adapter_folders.keys():
        server.services.registry.delete(name)


def add(client: httpx.Client, source: str, name: str = "new", **more: Any) -> httpx.Response:
    return client.post(ADAPTERS, json={"name": name, "source": source, **more})


def test_every_way_to_fail_has_a_status() -> None:
    assert set(SourceError.__subclasses__()) == SOURCE_ERRORS.keys()


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["code"] == code
    assert error["type"] == ("server_error" if status >= 500 else error["type"])
    return dict(error)


# What comes


def test_an_adapter_of_the_hub_serves_as_its_upload_does(
    client: httpx.Client, hub: Hub, files: Files
) -> None:
    commit = hub.commit("org/name", files)

    response = add(client, SOURCE)

    assert response.status_code == 201, response.text
    assert response.headers["Location"] == f"{ADAPTERS}/new"
    assert response.json()["source"] == f"hf://org/name@{commit}"
    assert stored(client, "new") == files
    texts = [complete(client, name).json()["choices"][0]["text"] for name in ("new", "mlp")]
    assert texts[0] == texts[1]


def test_a_new_revision_comes_from_a_bucket(
    client: httpx.Client, bucket: Callable[[str, bytes], None], hub: Hub, files: Files
) -> None:
    hub.commit("org/name", files)
    first = add(client, SOURCE).json()["revision"]
    for name, data in (files | {"chat_template.jinja": b"{{ messages }}"}).items():
        bucket(f"adapters/a/{name}", data)
    body = {"source": f"s3://{BUCKET}/adapters/a"}

    replaced = client.put(f"{ADAPTERS}/new", json=body)
    again = client.put(f"{ADAPTERS}/new", json=body)

    assert replaced.status_code == 200, replaced.text
    assert (replaced.json()["revision"], replaced.json()["unchanged"]) == (first + 1, False)
    assert replaced.json()["source"].startswith(f"s3://{BUCKET}/adapters/a#")
    assert (again.json()["revision"], again.json()["unchanged"]) == (first + 1, True)
    stale = client.put(f"{ADAPTERS}/new", json=body, headers={"If-Match": '"1-0"'})
    assert stale.status_code == 412


def test_a_folder_of_the_servers_machine_is_a_source(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    response = add(client, f"file://{adapter_folders['mlp']}")

    assert response.status_code == 201, response.text
    assert response.json()["source"] == f"file://{adapter_folders['mlp']}"


@refused
def test_a_dry_run_checks_and_keeps_nothing(client: httpx.Client, hub: Hub, files: Files) -> None:
    hub.commit("org/name", files)
    dry_run = {"params": {"dry_run": True}, "json": {"source": SOURCE}}

    for response in (client.post(ADAPTERS, **dry_run), client.put(f"{ADAPTERS}/mlp", **dry_run)):
        assert response.status_code == 200, response.text
        assert response.json()["object"] == "adapter.check"


# What does not


@refused
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"source": 5, "name": "new"}, "source"),
        ({"name": "new"}, "source"),
        ({"source": SOURCE, "name": ""}, "name"),
        ({"source": SOURCE}, "name"),
        ({"source": SOURCE, "name": "new", "token": "x"}, "token"),
        ({"source": "hf://org/../name", "name": "new"}, "source"),
        ({"source": "https://example.org/a", "name": "new"}, "source"),
        ({"source": "x" * 3000, "name": "new"}, "source"),
        ([], "body"),
    ],
)
def test_a_body_that_is_not_the_apis_is_refused(
    client: httpx.Client, hub: Hub, body: object, field: str
) -> None:
    response = client.post(ADAPTERS, json=body)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field
    assert hub.asked == []


def test_a_replacement_has_its_name_in_the_path_alone(client: httpx.Client) -> None:
    response = client.put(f"{ADAPTERS}/mlp", json={"source": SOURCE, "name": "mlp"})

    assert error_of(response, 400, "invalid_request")["param"] == "name"


@refused
def test_nothing_is_fetched_for_a_name_that_is_taken_or_not_known(
    client: httpx.Client, hub: Hub
) -> None:
    error_of(add(client, SOURCE, name="mlp"), 409, "adapter_exists")
    error_of(add(client, SOURCE, name="tiny"), 409, "adapter_exists")
    response = client.put(f"{ADAPTERS}/nobody", json={"source": SOURCE})
    error_of(response, 404, "adapter_not_found")

    assert hub.asked == []


@refused
@pytest.mark.parametrize(
    "source", ["hf://organisation/name", "s3://other/a", "file:///etc", "gs://bucket/a"]
)
def test_a_source_that_is_not_allowed_is_forbidden(client: httpx.Client, source: str) -> None:
    error = error_of(add(client, source), 403, "source_not_allowed")

    assert (error["type"], error["param"]) == ("permission_error", "source")
    assert "--source-prefixes" in error["message"]


def test_by_default_no_source_is_allowed(
    start_server: Callable[..., tuple[str, Services]],
) -> None:
    url, _ = start_server()
    with httpx.Client(base_url=url) as client:
        for source in (SOURCE, "s3://bucket/a", "gs://bucket/a", "az://bucket/a", "file:///tmp/a"):
            error_of(add(client, source), 403, "source_not_allowed")


@refused
@pytest.mark.parametrize("source", [SOURCE, "hf://org/name@gone", "hf://org/name/folder"])
def test_a_source_that_is_not_there_is_said_to_be_missing(
    client: httpx.Client, hub: Hub, source: str
) -> None:
    hub.commit("org/name", {})

    error = error_of(add(client, source), 400, "source_not_found")

    assert source in error["message"]


PUBLISHED: dict[str, tuple[Callable[[Files], Files], str]] = {
    "pickled": (
        lambda f: {CONFIG: f[CONFIG], "adapter_model.bin": torch_saved(f[WEIGHTS])},
        "pickled, which can run code",
    ),
    "pickled in disguise": (lambda f: f | {WEIGHTS: torch_saved(f[WEIGHTS])}, "pickled"),
    "damaged": (lambda f: f | {WEIGHTS: f[WEIGHTS][:-1]}, "damaged"),
    "weights alone": (lambda f: {WEIGHTS: f[WEIGHTS]}, f"{CONFIG}: is missing"),
    "config alone": (lambda f: {CONFIG: f[CONFIG]}, f"{WEIGHTS}: is missing"),
}


@refused
@pytest.mark.parametrize(("change", "said"), PUBLISHED.values(), ids=PUBLISHED)
def test_what_comes_is_checked_as_an_upload_is(
    client: httpx.Client, hub: Hub, files: Files, change: Callable[[Files], Files], said: str
) -> None:
    hub.commit("org/name", change(files))

    error = error_of(add(client, SOURCE), 400, "invalid_adapter")

    assert said in error["message"]
    assert all(fault["fix"] for fault in error["details"])


@refused
def test_a_source_larger_than_an_upload_may_be_is_cut_off(
    client: httpx.Client, hub: Hub, files: Files
) -> None:
    hub.commit("org/name", files | {"tokenizer.json": b" " * LIMIT})

    error = error_of(add(client, SOURCE), 413, "upload_too_large")

    assert str(LIMIT) in error["message"]


RUDE: dict[str, tuple[Talk, int, str]] = {
    "refuses": (says(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n"), 400, "source_refused"),
    "fails": (says(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"), 502, "source_failed"),
    "lies about a length": (
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}"),
        502,
        "source_failed",
    ),
    "never ends": (never_ends, 413, "upload_too_large"),
    "leads to a private address": (
        says(b"HTTP/1.1 302 Go\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"),
        502,
        "source_failed",
    ),
}


@pytest.mark.fault(
    "network",
    "What an adapter is fetched from refuses",
    by="a server that answers so",
    promise="400 `source_refused`; nothing stays, and no secret shows.",
    case="refuses",
)
@pytest.mark.fault(
    "network",
    "What an adapter is fetched from fails, or breaks off",
    by="a server that answers so",
    promise="502 `source_failed`; nothing stays, and no secret shows.",
    case="fails",
)
@pytest.mark.fault(
    "network",
    "What an adapter is fetched from says a wrong length",
    by="a server that answers so",
    promise="502 `source_failed`; nothing stays.",
    case="lies about a length",
)
@pytest.mark.fault(
    "network",
    "What an adapter is fetched from never ends",
    by="a server that answers so",
    promise="413 at the limit; nothing stays.",
    case="never ends",
)
@refused
@pytest.mark.parametrize("scheme", ["hf", "s3"])
@pytest.mark.parametrize(("talk", "status", "code"), RUDE.values(), ids=RUDE)
def test_a_server_that_means_no_good_is_an_error_that_shows_no_secret(
    client: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    talk: Talk,
    status: int,
    code: str,
) -> None:
    with rude_server(talk) as port:
        monkeypatch.setenv("HF_ENDPOINT", use_bucket_endpoint(monkeypatch, port))
        monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
        response = add(client, {"hf": SOURCE, "s3": f"s3://{BUCKET}/a"}[scheme])

    assert error_of(response, status, code)["param"] == "source"
    for secret in (HUB_TOKEN, "an-access-key-id", "a-secret-access-key", "Signature"):
        assert secret not in response.text


@pytest.mark.fault(
    "network",
    "What an adapter is fetched from hangs",
    by="a server that answers nothing",
    promise="504 after `--source-timeout`.",
)
def test_a_source_that_hangs_is_given_up(
    start_server: Callable[..., tuple[str, Services]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services = start_server(source_prefixes="hf://", source_timeout=0.5)
    with rude_server(hangs) as port, httpx.Client(base_url=url, timeout=60) as client:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        error = error_of(add(client, SOURCE), 504, "source_timeout")

    assert "0.5 seconds" in error["message"]
    assert services.registry.stored.names() == []


@pytest.mark.fault(
    "network",
    "What many adapters are fetched from hangs",
    by="a server that answers nothing",
    promise="Requests are answered meanwhile.",
)
def test_requests_are_answered_while_sources_hang(
    client: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sources are fetched at once, and no more."""
    four, free = threading.Semaphore(0), threading.Event()
    lock = threading.Lock()
    running: list[int] = [0, 0]
    """How many are fetched now, and how many were at most."""

    def hold(connection: Any) -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
        four.release()
        free.wait()
        with lock:
            running[0] -= 1
        connection.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")

    def fetch(number: int) -> int:
        with httpx.Client(base_url=server.base_url, timeout=60) as other:
            return add(other, SOURCE, name=f"new{number}").status_code

    with rude_server(hold) as port, ThreadPoolExecutor(8) as others:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        answers = [others.submit(fetch, number) for number in range(8)]
        for _ in range(4):
            assert four.acquire(timeout=60)
        try:
            assert complete(client, "mlp").status_code == 200
            assert client.get(ADAPTERS).status_code == 200
        finally:
            free.set()
        assert {answer.result() for answer in answers} == {502}
    assert running == [0, 4]
