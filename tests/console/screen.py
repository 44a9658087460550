"""The console in a browser's page, and what holds for every page of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PHONE = {"width": 360, "height": 740}
DESK = {"width": 1280, "height": 800}
SECONDS = 30


@dataclass(frozen=True)
class Screen:
    page: "Page"
    url: str

    @classmethod
    @contextmanager
    def of(cls, browser: Any, url: str, expected: tuple[int, ...] = ()) -> Iterator["Screen"]:
        """A new window. At its end: nothing failed in it, or came from another server.

        `expected`: statuses that answers may have beside success.
        """
        context = browser.new_context(viewport=DESK, reduced_motion="reduce")
        context.set_default_timeout(1000 * SECONDS)
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: _note(said, expected, problems))
        page.on("request", lambda asked: _check_origin(asked.url, url, problems))
        yield cls(page, url)
        context.close()
        assert not problems

    def open(self, place: str) -> None:
        self.page.goto(f"{self.url}/#/{place}")

    def button(self, name: str) -> "Locator":
        return self.page.get_by_role("button", name=name, exact=True)

    def check_for_everybody(self) -> None:
        """Check that what is shown has no fault that axe finds, in light and in dark, and that it
        fits a phone's width."""
        from axe_playwright_python.sync_playwright import Axe

        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            found = Axe().run(self.page)
            assert not found.response["violations"], f"{scheme}: {found.generate_report()}"
        self.page.emulate_media(color_scheme="light")
        self.page.set_viewport_size(PHONE)
        width = self.page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], "a phone would scroll sideways"
        self.page.set_viewport_size(DESK)


def _note(said: Any, expected: tuple[int, ...], problems: list[str]) -> None:
    if said.type == "error" and not any(f"status of {each} " in said.text for each in expected):
        problems.append(said.text)


def _check_origin(asked: str, url: str, problems: list[str]) -> None:
    if not asked.startswith((f"{url}/", "data:", "blob:")):
        problems.append(f"{asked} is on another server")
