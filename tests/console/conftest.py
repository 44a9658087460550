"""A browser, and a server whose console it looks at. Without Debian's chromium they are skipped."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import RunningServer, ServeAdapters, run_by_modules
from tests.api.conftest import adapter_folders as adapter_folders
from tests.api.conftest import model_folder as model_folder
from tests.api.conftest import serve_adapters as serve_adapters
from tests.console.screen import Screen

CHROMIUM = shutil.which("chromium")


# Not for the session: while a browser of playwright's is open, nothing else can run an event loop.
@pytest.fixture(scope="package")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright_api = pytest.importorskip("playwright.sync_api")

    with playwright_api.sync_playwright() as playwright:
        # Containers have little shared memory, and root no sandbox.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def console(serve_adapters: ServeAdapters) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with serve_adapters() as server:
            yield server


@pytest.fixture
def screen(browser: Any, console: RunningServer) -> Iterator[Screen]:
    """The console of a server without keys. Nothing in it may fail, or come from elsewhere."""
    with Screen.of(browser, console.base_url, expected=(400, 404)) as screen:
        yield screen


@pytest.fixture
def adapter_folder(console: RunningServer) -> Path:
    return console.adapter_folders["default"]
