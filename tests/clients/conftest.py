"""A real server of the default model, from the development's environment, for clients in one of
their own (`make test-clients`). Elsewhere these tests are not collected."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients_page import ClientsPage
from tests.served import served_by

ROOT = Path(__file__).parents[2]
collect_ignore_glob = [] if importlib.util.find_spec("litellm") else ["test_*.py"]
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("clients-page") and importlib.util.find_spec("litellm"):
        config.pluginmanager.register(ClientsPage(), "clients-page")


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the server."""
    folder = tmp_path_factory.mktemp("server")
    command = [ROOT / ".venv/bin/infuse", "serve", "--port", "0", "--max-model-len", "4096"]
    command += ["--adapters-dir", folder / "store"]
    command += ["--preload-adapters", ROOT / "examples" / "adapters"]
    with served_by(command, folder / "log", cwd=ROOT) as url:
        yield url


@pytest.fixture(scope="session")
def api(url: str) -> str:
    """The base URL of OpenAI's API."""
    return f"{url}/v1"


@pytest.fixture
def answered(url: str) -> Callable[[], float]:
    """How many requests the server has answered with 200 since the test began."""

    def count() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("infuse_http_requests_total")]
        done = [line for line in found if 'method="POST"' in line and 'status="200"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in done)

    before = count()
    return lambda: count() - before
