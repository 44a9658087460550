"""A real server on a free port, with a tiny model and adapters that PEFT saved.

With INFUSE_ENGINE=vllm in the environment, it is a server of that engine.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from transformers import AutoModelForCausalLM

from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.server.app import create_app
from infuse.server.cli import bind
from infuse.server.listener import Server
from infuse.server.services import Services
from infuse.server.settings import MEBIBYTE, Settings
from tests.api.documented import Documented
from tests.chat_templates import HERMES
from tests.factories import save_adapter, save_tiny_model

ADAPTERS: dict[str, dict[str, Any]] = {
    "default": {},
    "queries": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "mlp": {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
}


@dataclass(frozen=True)
class RunningServer:
    base_url: str
    services: Services
    model_folder: Path
    adapter_folders: dict[str, Path]


ServeAdapters = Callable[..., contextlib.AbstractContextManager[RunningServer]]


@contextlib.contextmanager
def run_server(settings: Settings) -> Iterator[tuple[str, Services]]:
    app = create_app(settings)
    strays: list[str] = []
    ports = [0] if settings.admin_port is None else [0, settings.admin_port]
    app.add_middleware(Documented, document=app.openapi(), strays=strays, has_ports=len(ports) > 1)
    listening = [bind("127.0.0.1", port) for port in ports]
    drain = min(settings.drain_timeout, 5.0)
    quiet = settings.model_copy(update={"log_level": "warning", "drain_timeout": drain})
    server = Server(app, quiet, app.state)
    thread = threading.Thread(target=server.run, kwargs={"sockets": listening})
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening[0].getsockname()[1]}", app.state.services
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server does not stop"
    assert not strays, f"not in the OpenAPI document: {strays}"


def run_by_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own engine does not trace its model: that would take most of many starts."""
    if Settings().engine == "native":
        from infuse.server.engine.native.forward.tracing import NotTraced

        not_traced = Mock(side_effect=NotTraced("a test of the API"))
        monkeypatch.setattr(
            "infuse.server.engine.native.forward.execution.find_or_trace", not_traced
        )


def save_model(folder: Path, *chat_template: str, **overrides: Any) -> Path:
    """Save a tiny model that either engine serves."""
    # vLLM has no attention for heads as small as those of the tiny model.
    shape = {"head_dim": 32} if Settings().engine == "vllm" else {}
    return save_tiny_model(folder, *chat_template, **shape | overrides)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def adapter_folders(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base, root / name, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items(), start=1)
    }


@pytest.fixture(scope="session")
def serve_adapters(
    model_folder: Path,
    adapter_folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> ServeAdapters:
    """Start a server of the model and its adapters, for the time of a `with` block."""

    @contextlib.contextmanager
    def serve_adapters(**overrides: Any) -> Iterator[RunningServer]:
        settings: dict[str, Any] = {
            "model": str(model_folder),
            "served_model_name": "tiny",
            "adapters_dir": tmp_path_factory.mktemp("store"),
            "preload_adapters": adapter_folders["default"].parent,
            "max_upload_bytes": 64 * MEBIBYTE,
            "max_batch_rows": 8,
        }
        with run_server(Settings(**settings | overrides)) as (url, services):
            yield RunningServer(url, services, model_folder, adapter_folders)

    return serve_adapters


@pytest.fixture(scope="session")
def server(serve_adapters: ServeAdapters) -> Iterator[RunningServer]:
    with serve_adapters() as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.base_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def url_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model has a chat template with tools, as Qwen's."""
    root = tmp_path_factory.mktemp("tools")
    model = save_model(root / "model", HERMES, max_position_embeddings=2048)
    settings = Settings(model=str(model), served_model_name="tiny", adapters_dir=root / "store")
    with run_server(settings) as (url, _):
        yield url


@pytest.fixture
def start_server(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[str, Services]]]:
    """Start a server with other settings; it stops with the test.

    It runs its model by the modules: tracing them would take most of so many starts.
    """
    run_by_modules(monkeypatch)
    with contextlib.ExitStack() as servers:

        def start(**overrides: Any) -> tuple[str, Services]:
            settings: dict[str, Any] = {
                "model": str(model_folder),
                "served_model_name": "tiny",
                "adapters_dir": tmp_path / "store",
                "max_batch_rows": 8,
            }
            return servers.enter_context(run_server(Settings(**settings | overrides)))

        yield start


class Gate:
    """Stops the merges' worker at its next tensor, until the gate is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def pass_through(self) -> None:
        if threading.current_thread().name.startswith("merges"):
            self.reached.set()
            assert self.open.wait(60), "a test left the gate closed"


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()

    parameter = BaseCheckpoint.parameter

    def gated(checkpoint: BaseCheckpoint, key: str) -> str | None:
        gate.pass_through()
        return parameter(checkpoint, key)

    monkeypatch.setattr(BaseCheckpoint, "parameter", gated)
    yield gate
    gate.open.set()
