"""docs/guide/clients.md: what other programs get from this server, as their tests have seen it.

A test that runs a client says so: `@pytest.mark.client(package, what)`, and with `refused=…` why it
gets an error that says so.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

import pytest

from tests.marks import ROOT, read_marks

PAGE = ROOT / "docs" / "guide" / "clients.md"
NOT_RUN = "not run"
_ABOUT = """# Clients

Written by the tests that it names, not by hand: `make test-clients` runs those in `tests/clients`,
`make test-full` and `make test-vllm ARGS=--full` those in `tests/api`. Each runs the client as its
package has it against a real server. *Version* is the one that the test last passed with.

A client of OpenAI's API needs a base URL, `http://127.0.0.1:8000/v1`, any key where the server has
none, and a name from `GET /v1/models`: the base model's, an adapter's, or `name@revision`. What is
refused is refused with an error that says what to do.

| client | version | what | answer | test |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Use:
    """A mark of a test."""

    test: str
    """Its file and name, as pytest names it."""
    package: str
    what: str
    refused: str = ""
    """Why the server refuses it; empty: it works."""


def marked() -> list[Use]:
    """What tests are marked with, in the page's order."""
    return sorted(read_marks("client", Use), key=lambda use: (use.package, bool(use.refused)))


def page(uses: Iterable[Use], versions: Mapping[Use, str]) -> str:
    return _ABOUT + "".join(f"{_row(use, versions.get(use, NOT_RUN))}\n" for use in uses)


def _row(use: Use, passed_with: str) -> str:
    answer = f"refused: {use.refused}" if use.refused else "works"
    return f"| {use.package} | {passed_with} | {use.what} | {answer} | `{use.test}` |"


def versions_on(text: str, uses: Iterable[Use]) -> dict[Use, str]:
    """The versions that a page has of each use that stands in it."""
    rows = set(text.splitlines())
    seen = {line.split(" | ")[1] for line in rows if line.startswith("| ")}
    return {use: each for use in uses for each in seen if _row(use, each) in rows}


class ClientsPage:
    """A pytest plugin that writes the page at the end of a session that has run clients. What it
    did not run stays as it was."""

    def __init__(self, path: Path = PAGE, uses: list[Use] | None = None) -> None:
        self._path = path
        self._uses = marked() if uses is None else uses
        self._passed: dict[Use, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or (report.when != "call" and report.passed):
            return
        for use in self._uses:
            if report.nodeid.partition("[")[0] == use.test:
                self._passed[use] = self._passed.get(use, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        if not self._passed:
            return
        before = self._path.read_text() if self._path.exists() else ""
        versions = versions_on(before, self._uses)
        for use, passed in self._passed.items():
            versions[use] = _installed(use.package) if passed else NOT_RUN
        self._path.write_text(page(self._uses, versions))


def _installed(package: str) -> str:
    """The version in this environment, or in one that the package has of its own."""
    own = ROOT.glob(f".venv-{package}/lib/python*/site-packages")
    found = distributions(name=package, path=[*sys.path, *map(str, own)])
    return next((each.version for each in found), NOT_RUN)
