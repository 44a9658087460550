"""The guide's pictures of the console, on the default model. They are written by `--full`."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import run_by_modules, run_server
from tests.console.screen import Screen

pytestmark = [pytest.mark.full, pytest.mark.real]

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs/pictures"
ADAPTERS = ROOT / "examples/adapters"
DETAILS = {
    "order-json": {"description": "Reads order mails", "tags": ["orders", "json"]},
    "sentiment": {"description": "Sorts reviews", "tags": ["reviews", "sorts"]},
    "support-intent": {"description": "Sorts support requests", "tags": ["support", "sorts"]},
}
REVIEW = "The soup was cold and the waiter ignored us all evening."


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        settings = Settings(adapters_dir=store, preload_adapters=ADAPTERS, max_model_len=1024)
        with run_server(settings) as (url, _), httpx.Client(base_url=url, timeout=300) as client:
            for name, details in DETAILS.items():
                assert client.patch(f"/v1/adapters/{name}", json=details).is_success
                asked = {"model": name, "prompt": REVIEW, "max_tokens": 4}
                assert client.post("/v1/completions", json=asked).is_success
            yield url


@pytest.fixture
def screen(browser: Any, url: str) -> Iterator[Screen]:
    with Screen.of(browser, url) as screen:
        yield screen


def take(screen: Screen, name: str) -> None:
    screen.page.screenshot(path=PICTURES / f"console-{name}.png", full_page=True)


def test_adapters(screen: Screen) -> None:
    screen.open("adapters/sentiment")
    screen.page.get_by_role("group", name="Revisions").get_by_role("row").nth(1).wait_for()
    screen.page.get_by_text("on the device").nth(2).wait_for()
    take(screen, "adapters")
    screen.check_for_everybody()


def test_compare(screen: Screen) -> None:
    screen.open("compare/sentiment")
    screen.page.get_by_label("Adapter", exact=True).fill("order-json")
    screen.button("Add a column").click()
    mixed = screen.page.get_by_role("region", name="order-json")
    mixed.get_by_label("Adapter to mix in").fill("sentiment")
    mixed.get_by_role("button", name="Mix in").click()
    screen.page.get_by_label("Prompt").fill(REVIEW)
    screen.page.get_by_label("Tokens at most").fill("24")
    screen.button("Run").click()
    screen.page.get_by_text("tokens, then").nth(2).wait_for()
    base = screen.page.get_by_role("region", name="Base model")
    base.get_by_role("option").nth(4).hover()
    take(screen, "compare")
    screen.check_for_everybody()


def test_look_inside(screen: Screen) -> None:
    screen.open("look/sentiment")
    screen.page.locator("canvas").nth(2).wait_for()
    screen.page.get_by_role("group", name="Similarity").wait_for()
    take(screen, "look")
    screen.check_for_everybody()


def test_serve(screen: Screen, url: str) -> None:
    enough = threading.Event()

    def generate(name: str) -> None:
        body = {"model": name, "prompt": REVIEW, "max_tokens": 512, "ignore_eos": True}
        sent = {"json": body | {"stream": True}, "timeout": 300}
        with httpx.stream("POST", f"{url}/v1/completions", **sent) as stream:
            for _ in stream.iter_lines():
                if enough.is_set():
                    return

    threads = [threading.Thread(target=generate, args=[name]) for name in DETAILS]
    for thread in threads:
        thread.start()
    try:
        screen.open("serve")
        screen.page.get_by_role("group", name="The batch now").get_by_role("row").nth(3).wait_for()
        for _ in range(8):
            with screen.page.expect_request("**/debug/batch"):
                pass
        take(screen, "serve")
        screen.check_for_everybody()
    finally:
        enough.set()
        for thread in threads:
            thread.join(300)
