"""Administration on a port of its own: what is there, and what the other port answers for it."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from infuse.server.cli import bind
from infuse.server.settings import Settings
from tests.api.conftest import run_by_modules, run_server
from tests.api.test_auth import ADMIN, GENERATE, KEYS, bearer, keys_file
from tests.served import served_by

HEALTH, DOCS = ["/health/live", "/health/ready"], ["/docs", "/openapi.json"]
OPERATORS = [*((method, path) for method, path, _ in ADMIN), ("GET", "/metrics")]
OTHERS = [(method, path) for method, path, _ in GENERATE]
NOTHING = "/v1/nothing"
CALLERS = ["nobody", *KEYS]
INFUSE = Path(sys.executable).with_name("infuse")


def free_port() -> int:
    with closing(bind("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@dataclass(frozen=True)
class Ports:
    public: str
    admin: str


def run(settings: Settings) -> Iterator[Ports]:
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with run_server(settings) as (public, _):
            yield Ports(public, f"http://127.0.0.1:{settings.admin_port}")


@pytest.fixture(scope="module")
def guarded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    folder = tmp_path_factory.mktemp("ports")
    yield from run(
        Settings(
            model=str(model_folder),
            served_model_name="tiny",
            adapters_dir=folder / "store",
            keys_file=keys_file(folder / "keys.json"),
            admin_port=free_port(),
        )
    )


@pytest.fixture(scope="module")
def anonymous(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    store = tmp_path_factory.mktemp("anonymous")
    yield from run(
        Settings(
            model=str(model_folder),
            served_model_name="tiny",
            adapters_dir=store,
            admin_port=free_port(),
        )
    )


def answer(url: str, method: str, path: str, caller: str) -> tuple[int, str, list[tuple[str, str]]]:
    """The answer, without the path, the time and the request's id."""
    headers = {} if caller == "nobody" else bearer(caller)
    got = httpx.request(method, url + path, headers=headers)
    kept = [(k, v) for k, v in got.headers.items() if k not in ("date", "x-request-id")]
    bare = httpx.URL(path).path
    stated = [(k, v) for k, v in kept if k != "content-length"]
    return got.status_code, got.text.replace(bare, "PATH"), stated


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("method", "path"), OPERATORS)
def test_the_public_port_answers_for_administration_as_for_what_does_not_exist(
    guarded: Ports, method: str, path: str, caller: str
) -> None:
    there = answer(guarded.public, method, path, caller)

    assert there == answer(guarded.public, method, NOTHING, caller)
    assert there[0] == {"nobody": 401, "admin": 403, "metrics": 403}.get(caller, 404)


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize(("method", "path"), OTHERS)
def test_the_admin_port_answers_for_all_else_as_for_what_does_not_exist(
    guarded: Ports, method: str, path: str, caller: str
) -> None:
    there = answer(guarded.admin, method, path, caller)

    assert there == answer(guarded.admin, method, NOTHING, caller)


@pytest.mark.parametrize(("method", "path"), OPERATORS)
def test_the_admin_port_asks_for_the_same_roles(guarded: Ports, method: str, path: str) -> None:
    as_public = httpx.request(method, guarded.admin + path)
    as_app = httpx.request(method, guarded.admin + path, headers=bearer("generate"))
    as_admin = httpx.request(method, guarded.admin + path, headers=bearer("admin"))

    assert (as_public.status_code, as_app.status_code) == (401, 403)
    assert as_admin.status_code not in (401, 403)
    assert "There is nothing at" not in as_admin.text


@pytest.mark.parametrize("path", ["/metrics/", "/v1/adapters/", "//metrics", "/v1/%61dapters"])
def test_no_other_spelling_leads_from_the_public_port_to_administration(
    guarded: Ports, path: str
) -> None:
    got = httpx.get(guarded.public + path, headers=bearer("everything"))

    assert got.status_code == 404


def test_the_name_that_a_request_gives_the_server_opens_no_port(guarded: Ports) -> None:
    admin = httpx.URL(guarded.admin).netloc.decode()
    headers = bearer("everything") | {
        "Host": admin,
        "X-Forwarded-Host": admin,
        "X-Forwarded-Port": admin.partition(":")[2],
        "Forwarded": f"host={admin}",
    }

    assert httpx.get(f"{guarded.public}/metrics", headers=headers).status_code == 404


@pytest.mark.parametrize("path", [*HEALTH, *DOCS, "/", "/console/console.js"])
def test_health_the_documentation_and_the_console_are_on_both_ports(
    guarded: Ports, path: str
) -> None:
    for url in (guarded.public, guarded.admin):
        assert httpx.get(url + path).status_code == 200


def test_without_keys_the_ports_are_apart_too(anonymous: Ports) -> None:
    for path, public, admin in (
        ("/metrics", 404, 200),
        ("/v1/adapters", 404, 200),
        ("/debug/batch", 404, 200),
        ("/v1/models", 200, 404),
        ("/health/ready", 200, 200),
    ):
        assert httpx.get(anonymous.public + path).status_code == public
        assert httpx.get(anonymous.admin + path).status_code == admin


def test_infuse_serve_listens_on_both_and_stops_both(model_folder: Path, tmp_path: Path) -> None:
    log, admin = tmp_path / "log", free_port()
    command = [INFUSE, "serve", "--port", "0", "--admin-port", str(admin)]
    options = ["--model", model_folder, "--adapters-dir", tmp_path / "store"]

    with served_by([*command, *options], log) as url:
        assert httpx.get(f"{url}/metrics").status_code == 404
        assert httpx.get(f"http://127.0.0.1:{admin}/metrics").status_code == 200
        assert f"Administration answers on http://127.0.0.1:{admin} " in log.read_text()

    for address in (url, f"http://127.0.0.1:{admin}"):
        with pytest.raises(httpx.ConnectError):
            httpx.get(address)
