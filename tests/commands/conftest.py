"""A server with keys, and the command line as a script and as a person at a terminal call it."""

import json
import os
import pty
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from infuse.server.cli import app
from infuse.server.client import Client
from infuse.server.settings import Settings
from tests.api.conftest import gate as gate
from tests.api.conftest import run_by_modules, run_server
from tests.factories import save_adapter, save_tiny_model, tiny_model

ROLES = ("admin", "generate")
Infuse = Callable[..., Result]
"""Runs a command with the server's URL and a key of an administrator."""
Typed = Callable[..., str]
"""Runs a command at a terminal, and returns what that shows, without its colours."""


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL. Each key is called as its role."""
    folder = tmp_path_factory.mktemp("commands")
    keys = folder / "keys.json"
    entries = [{"name": role, "key": f"the-key-of-{role}", "roles": [role]} for role in ROLES]
    keys.write_text(json.dumps(entries))
    settings = Settings(
        model=str(save_tiny_model(folder / "tiny")),
        adapters_dir=folder / "store",
        keys_file=keys,
    )
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with run_server(settings) as (url, _):
            yield url


@pytest.fixture(scope="package")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders that PEFT saved."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(tiny_model("llama"), root / f"{seed}", seed=seed).rename(root / name)
        for seed, name in enumerate(("first", "second"), start=1)
    ]


@pytest.fixture
def environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFUSE_URL", server)
    monkeypatch.setenv("INFUSE_API_KEY", "the-key-of-admin")


@pytest.fixture
def infuse(environment: None) -> Infuse:  # noqa: ARG001
    def run(*words: object, **more: Any) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], **more)

    return run


@pytest.fixture
def typed(environment: None, monkeypatch: pytest.MonkeyPatch) -> Typed:  # noqa: ARG001
    """`lines`: what is typed in."""

    def run(*words: object, lines: tuple[str, ...] = ()) -> str:
        keyboard, stdin = pty.openpty()
        screen, stdout = pty.openpty()
        os.write(keyboard, "".join(f"{line}\n" for line in lines).encode())
        with ThreadPoolExecutor(1) as thread:
            seen = thread.submit(all_of, screen)
            with (
                monkeypatch.context() as patch,
                open(stdin) as typed_in,
                open(stdout, "w") as shown,
            ):
                patch.setenv("COLUMNS", "200")
                patch.setattr(sys, "stdin", typed_in)
                patch.setattr(sys, "stdout", shown)
                patch.setattr(sys, "stderr", shown)
                app([str(word) for word in words], standalone_mode=False)
        os.close(keyboard)
        os.close(screen)
        return re.sub(r"\x1b\[[\d;]*m", "", seen.result().decode())

    return run


def all_of(screen: int) -> bytes:
    """All that comes until the terminal is closed, which Linux tells by an error."""
    read = b""
    with suppress(OSError):
        while more := os.read(screen, 1 << 16):
            read += more
    return read


@pytest.fixture(scope="package")
def added(server: str, adapters: list[Path]) -> None:
    """The server has the adapters `first`, at revision 2, and `second`."""
    first, second = map(str, adapters)
    with Client(server, "the-key-of-admin") as client:
        client.add("first", second)
        client.replace("first", first)
        client.add("second", second)


@pytest.fixture
def http(server: str) -> Iterator[httpx.Client]:
    """A client of the API, with a key of an administrator."""
    headers = {"Authorization": "Bearer the-key-of-admin"}
    with httpx.Client(base_url=server, headers=headers, timeout=60) as client:
        yield client
