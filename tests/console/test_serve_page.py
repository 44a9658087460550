"""The page that shows what the server does now, in a browser."""

import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.console.screen import Screen


@pytest.fixture
def running(console: RunningServer) -> Iterator[None]:
    """A request that runs until the test has ended."""
    begun, enough = threading.Event(), threading.Event()
    body = {"model": "queries", "prompt": "x", "max_tokens": 200, "ignore_eos": True}

    def generate() -> None:
        while not enough.is_set():
            with httpx.stream(
                "POST", f"{console.base_url}/v1/completions", json=body | {"stream": True}
            ) as stream:
                for _ in stream.iter_lines():
                    begun.set()
                    if enough.is_set():
                        return

    thread = threading.Thread(target=generate)
    thread.start()
    assert begun.wait(60)
    yield
    enough.set()
    thread.join(60)


@pytest.mark.usefixtures("running")
def test_the_batch_and_its_adapter_are_shown(screen: Screen) -> None:
    screen.open("serve")
    screen.page.get_by_role("group", name="The batch now").get_by_text("queries@1").first.wait_for()

    for tile in ("Running", "Waiting", "Tokens a second", "KV cache", "Prefix cache", "Slots"):
        assert screen.page.get_by_role("term").filter(has_text=tile).first.is_visible()
    screen.page.get_by_role("heading", name="Adapters on the device").wait_for()
    screen.page.get_by_text("The server's process has").wait_for()
    screen.check_for_everybody()


def test_the_page_looks_again_and_again(screen: Screen) -> None:
    screen.open("serve")
    for _ in range(2):
        with screen.page.expect_request("**/debug/batch"):
            pass


def test_merges_are_shown_with_their_progress_and_deleted(
    screen: Screen, console: RunningServer
) -> None:
    merge = httpx.post(f"{console.base_url}/v1/merges", json={"adapter": "mlp"}).json()["id"]
    screen.open("serve")
    row = screen.page.get_by_role("group", name="Merges").get_by_role("row").filter(has_text="mlp")
    row.get_by_text("succeeded").wait_for()
    screen.check_for_everybody()
    row.get_by_role("button").click()
    row.get_by_text("Delete for good").click()
    row.wait_for(state="detached")

    assert httpx.get(f"{console.base_url}/v1/merges/{merge}").status_code == 404
