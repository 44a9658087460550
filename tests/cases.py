"""How many cases the fuzzers have tried, by kind, at the end of a session."""

from collections import Counter

import pytest


class Cases:
    """A pytest plugin that adds up the property `cases` of the tests that passed."""

    def __init__(self) -> None:
        self._cases: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.passed else ():
            if name == "cases" and report.when == "call":
                self._cases[report.nodeid] += int(str(value))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._cases:
            terminalreporter.section("cases")
            for test, count in self._cases.items():
                terminalreporter.write_line(f"{count:9,} {test}")
            terminalreporter.write_line(f"{self._cases.total():9,} in all")
