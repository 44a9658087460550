"""The console's shell: its files, its pages by mouse and keyboard, and the question for a key."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer, ServeAdapters, run_by_modules
from tests.api.test_auth import key_of, keys_file
from tests.console.screen import Screen

ROOT = Path(__file__).parents[2]
SOURCES, BUILT = ROOT / "console", ROOT / "server/console"
PAGES = {"Adapters": "adapters", "Compare": "compare", "Look inside": "look", "Serve": "serve"}
FILES = ["/", "/console/console.js", "/console/style.css", "/console/icon.svg"]


def test_the_built_files_are_those_of_the_sources() -> None:
    files = ["package-lock.json", *(f"src/{path.name}" for path in (SOURCES / "src").iterdir())]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file}\0".encode() + (SOURCES / file).read_bytes() + b"\0")

    built = (BUILT / "built-from.txt").read_text().strip()
    assert built == digest.hexdigest(), "run `make console` and commit what it writes"


@pytest.fixture(scope="module")
def guarded(
    serve_adapters: ServeAdapters, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server that wants keys."""
    keys = keys_file(tmp_path_factory.mktemp("keys") / "keys.json")
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with serve_adapters(keys_file=keys) as server:
            yield server


@pytest.mark.parametrize("path", FILES)
def test_the_files_need_no_key(guarded: RunningServer, path: str) -> None:
    answer = httpx.get(guarded.base_url + path)

    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize("path", ["/console", "/console/", "/console/x.js", "/console/../auth.py"])
def test_there_are_no_other_files(guarded: RunningServer, path: str) -> None:
    assert httpx.get(guarded.base_url + path).status_code in (401, 404)


def test_each_page_is_reached_by_its_link(screen: Screen) -> None:
    screen.open("")
    for title, place in PAGES.items():
        screen.page.get_by_role("link", name=title, exact=True).click()
        screen.page.get_by_role("heading", name=title, exact=True, level=1).wait_for()
        assert screen.page.url == f"{screen.url}/#/{place}"
        assert screen.page.title().startswith(title)


def test_each_page_is_reached_by_the_keyboard(screen: Screen) -> None:
    screen.open("adapters")
    screen.page.get_by_role("heading", name="Adapters", level=1).wait_for()
    for _ in range(3):
        # The mark and the first page come before it.
        screen.page.keyboard.press("Tab")
    screen.page.keyboard.press("Enter")

    screen.page.get_by_role("heading", name="Compare", level=1).wait_for()
    screen.page.wait_for_function("document.activeElement.tagName === 'MAIN'")


def test_it_works_under_a_path_prefix(screen: Screen) -> None:
    """As behind a proxy that takes the prefix away."""
    prefix = f"{screen.url}/behind/a/proxy/"
    screen.page.route(
        f"{prefix}**",
        lambda route: route.continue_(url=route.request.url.replace(prefix, f"{screen.url}/")),
    )
    screen.page.goto(prefix)

    screen.page.get_by_role("link", name="queries").wait_for()


@pytest.fixture
def locked(browser: Any, guarded: RunningServer) -> Iterator[Screen]:
    with Screen.of(browser, guarded.base_url, expected=(401, 403)) as screen:
        yield screen


def test_a_key_is_asked_for_once_and_kept_in_memory_only(locked: Screen) -> None:
    locked.open("adapters")
    field = locked.page.get_by_label("Key", exact=True)
    field.fill("not a key")
    field.press("Enter")
    locked.page.get_by_role("alert").filter(has_text="No valid API key").wait_for()
    locked.check_for_everybody()
    field.fill(key_of("everything"))
    field.press("Enter")
    locked.page.get_by_role("link", name="queries").wait_for()
    for title in ("Compare", "Serve", "Adapters"):
        locked.page.get_by_role("link", name=title, exact=True).click()
    locked.page.get_by_role("link", name="queries").wait_for()

    assert not locked.page.get_by_role("dialog").is_visible()
    kept = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])"
    assert locked.page.evaluate(kept) == '[{},{},""]'
    locked.page.reload()
    locked.page.get_by_role("dialog").wait_for()


def test_who_gives_no_key_is_told_why_and_can_give_one_later(locked: Screen) -> None:
    locked.open("adapters")
    locked.button("Go on without").click()
    locked.page.get_by_role("alert").filter(has_text="No valid API key").wait_for()
    locked.button("Give a key").click()
    locked.page.get_by_label("Key", exact=True).fill(key_of("admin"))
    locked.button("Use the key").click()

    locked.page.get_by_role("link", name="queries").wait_for()


def test_what_the_key_may_not_do_is_said_in_the_server_s_words(locked: Screen) -> None:
    locked.open("adapters")
    locked.page.get_by_label("Key", exact=True).fill(key_of("generate"))
    locked.button("Use the key").click()

    locked.page.get_by_role("alert").filter(has_text="lacks the role 'admin'").wait_for()
