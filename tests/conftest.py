"""Configures all tests: no deadlines, only the tests that are asked for, and a bucket."""

import importlib.util
import io
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from tests.report import Report

hypothesis.settings.register_profile("infuse", deadline=None, derandomize=True)
hypothesis.settings.load_profile("infuse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full as well")
    parser.addoption("--report", type=Path, help="write what was run, as Markdown")


def pytest_configure(config: pytest.Config) -> None:
    if path := config.getoption("--report"):
        config.pluginmanager.register(Report(path))
    # A process of pytest-xdist sees some of the tests; the one that started it hears of all.
    if config.getoption("--full") and not hasattr(config, "workerinput"):
        from tests.cases import Cases
        from tests.clients_page import ClientsPage
        from tests.engine.models_page import ModelsPage
        from tests.reliability_page import ReliabilityPage

        config.pluginmanager.register(Cases())
        config.pluginmanager.register(ModelsPage())
        config.pluginmanager.register(ClientsPage())
        if not config.option.keyword:
            config.pluginmanager.register(ReliabilityPage())
        if importlib.util.find_spec("vllm"):
            from tests.vllm.models_page import VllmModelsPage

            config.pluginmanager.register(VllmModelsPage())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        _deselect(config, items, lambda item: item.get_closest_marker("gpu") is not None)
    if os.environ.get("INFUSE_ENGINE") == "vllm":
        _deselect(config, items, lambda item: item.get_closest_marker("native") is not None)
    if not (config.getoption("--full") or "full" in config.option.markexpr):
        _deselect(config, items, lambda item: item.get_closest_marker("full") is not None)


def _has_gpu() -> bool:
    # Seconds that a session without such tests need not wait.
    import torch

    return torch.cuda.is_available()


def _deselect(
    config: pytest.Config, items: list[pytest.Item], unwanted: Callable[[pytest.Item], bool]
) -> None:
    config.hook.pytest_deselected(items=[item for item in items if unwanted(item)])
    items[:] = [item for item in items if not unwanted(item)]


@pytest.fixture
def free_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens take no longer, as on a device that waits for memory: every row is drafted."""
    from infuse.server.engine.native.scheduling.speculation import StepCosts

    monkeypatch.setattr(StepCosts, "seconds", lambda *_: 1.0)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 with one bucket, named bucket."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    app = one_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.port}"
    httpx.put(f"{endpoint}/bucket").raise_for_status()
    yield endpoint
    server.shutdown()
    thread.join()


def one_at_a_time(app: Any) -> Any:
    """moto is not made for threads: a list fails while another request puts."""
    mutex = threading.Lock()

    def answer(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        # Outside of the lock: a request may come slowly, or not to its end.
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with mutex:
            return list(app(environ | {"wsgi.input": io.BytesIO(body)}, start_response))

    return answer


_PREFIXES = itertools.count()


@pytest.fixture
def s3(
    s3_server: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A URL under which nothing is yet; the environment says how to get there.

    What is kept on this machine of a bucket goes by its URL, which other processes use as well.
    """
    monkeypatch.setenv("INFUSE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return f"s3://bucket/{next(_PREFIXES)}"
