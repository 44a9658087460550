"""docs/guide/clients.md has a row for each client that a test runs, and its rows are true."""

from pathlib import Path

import pytest

from tests.clients_page import NOT_RUN, PAGE, ClientsPage, Use, marked, page, versions_on

MARKED = marked()
WORKS = Use("t/test_a.py::test_b", "pytest", "runs tests")
REFUSED = Use("t/test_a.py::test_c", "no-such-package", "sings", refused="it cannot")


def test_the_page_has_every_marked_test_and_names_no_other() -> None:
    text = PAGE.read_text()

    assert text == page(MARKED, versions_on(text, MARKED)), (
        "run the tests whose marks have changed: make test-clients, or with --full"
    )


def test_every_row_of_the_page_has_passed() -> None:
    versions = versions_on(PAGE.read_text(), MARKED)

    assert [use for use in MARKED if versions.get(use, NOT_RUN) == NOT_RUN] == []


def write(path: Path, *outcomes: tuple[Use, str]) -> str:
    plugin = ClientsPage(path, [REFUSED, WORKS])
    for use, outcome in outcomes:
        report = pytest.TestReport(f"{use.test}[x]", ("", 0, ""), {}, outcome, None, "call")
        plugin.pytest_runtest_logreport(report)
    plugin.pytest_sessionfinish()
    return path.read_text()


def test_a_session_writes_the_versions_that_passed_and_keeps_what_it_did_not_run(
    tmp_path: Path,
) -> None:
    path = tmp_path / "page.md"
    first = write(path, (WORKS, "passed"))

    row = f"| pytest | {pytest.__version__} | runs tests | works | `t/test_a.py::test_b` |"
    assert row in first
    assert "| no-such-package | not run | sings | refused: it cannot |" in first
    assert row in write(path, (REFUSED, "failed"))
    assert row not in write(path, (WORKS, "passed"), (WORKS, "failed"))
