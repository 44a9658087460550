"""docs/reliability.md has a row for each fault that a test injects, and its rows are true."""

from pathlib import Path

import pytest

from tests.reliability_page import (
    FIGURE,
    GROUPS,
    NOT_RUN,
    PAGE,
    Fault,
    ReliabilityPage,
    marked,
    page,
    seen_on,
)

MARKED = marked()
KILLS = Fault("t/test_a.py::test_b", "process", "killed", by="SIGKILL", promise="It is there.")
HANGS = Fault("t/test_a.py::test_c", "bucket", "hangs", by="x", promise="y", case="hangs")


def test_the_page_has_every_marked_test_and_names_no_other() -> None:
    text = PAGE.read_text()

    assert text == page(MARKED, seen_on(text, MARKED)), (
        "run the tests whose marks have changed with --full"
    )


def test_no_promise_of_the_page_was_broken_and_at_least_40_were_seen_to_hold() -> None:
    seen = seen_on(PAGE.read_text(), MARKED)

    assert [fault for fault in MARKED if " failed" in seen[fault]] == []
    assert len({fault.what for fault in MARKED if " passed" in seen[fault]}) >= 40
    assert {fault.group for fault in MARKED} == GROUPS.keys()


def report(nodeid: str, *figures: str, outcome: str = "passed") -> pytest.TestReport:
    properties: list[tuple[str, object]] = [(FIGURE, figure) for figure in figures]
    return pytest.TestReport(
        nodeid, ("", 0, ""), {}, outcome, None, "call", user_properties=properties
    )


def write(path: Path, *reports: pytest.TestReport) -> str:
    plugin = ReliabilityPage(path, [KILLS, HANGS])
    for each in reports:
        plugin.pytest_runtest_logreport(each)
    plugin.pytest_sessionfinish()
    return path.read_text()


def test_a_session_writes_what_it_saw_and_keeps_what_it_did_not_run(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    first = write(path, *(report(f"{KILLS.test}[{n}]", f"{n} kills") for n in (30, 100)))

    assert "| `t/test_a.py::test_b` | 2 cases passed, 100 kills, 30 kills |" in first
    assert f"| `t/test_a.py::test_c` | {NOT_RUN} |" in first
    second = write(
        path,
        report(f"{HANGS.test}[hangs-create]"),
        report(f"{HANGS.test}[hangs-delete]", outcome="failed"),
        report(f"{HANGS.test}[refuses-create]"),
    )
    assert "| 2 cases passed, 100 kills, 30 kills |" in second
    assert "| 1 case failed, 1 case passed |" in second


def test_what_another_engine_saw_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.md"
    monkeypatch.setenv("INFUSE_ENGINE", "vllm")
    write(path, report(KILLS.test))
    monkeypatch.setenv("INFUSE_ENGINE", "native")
    write(path, report(KILLS.test), report(KILLS.test))
    monkeypatch.setenv("INFUSE_ENGINE", "vllm")

    text = write(path, report(KILLS.test), report(KILLS.test), report(KILLS.test))

    assert "| 2 cases passed; vLLM: 3 cases passed |" in text
