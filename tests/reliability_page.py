"""docs/reliability.md: the faults that tests inject, what is promised then, and what was seen.

A test that injects a fault says so: `@pytest.mark.fault(group, what, by=…, promise=…)`. One that
injects several has a mark for each, with the word of its cases: `case="hangs"`.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.marks import ROOT, read_marks

PAGE = ROOT / "docs" / "reliability.md"
FIGURE = "figure"
"""The property by which a test says how much it injected: `record_property(FIGURE, "30 kills")`."""
NOT_RUN = "not run"
GROUPS = {
    "process": "The model and the server's process",
    "memory": "Memory",
    "disk": "Disks",
    "bucket": "Buckets",
    "network": "Clients and the network",
    "clock": "Clocks",
    "configuration": "Configuration and the operator's files",
}
_ON_VLLM = "vLLM: "
_ABOUT = """# Reliability

Written by the tests that it names, with `--full`; not by hand.

{count} faults, each with what is promised when it happens, the test that injects it, and what was
seen. Faults come from outside, through what a server meets in production as well: file systems that
are full, read-only, frozen or broken, a proxy before the bucket, signals, limits of memory, raw
sockets, a clock that is set. *Seen* counts the cases of the test, on our own engine unless it says
vLLM.
"""
_HEAD = "| fault | injected by | promise | test | seen |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Fault:
    """A mark of a test."""

    test: str
    """Its file and name, as pytest names it."""
    group: str
    what: str
    by: str = field(kw_only=True)
    """The interface through which it is injected."""
    promise: str = field(kw_only=True)
    case: str = field(default="", kw_only=True)
    """A part of the ids of the cases that inject it, as in `[hangs-create]`; empty: all do."""

    def is_injected_by(self, nodeid: str) -> bool:
        function, bracket, case = nodeid.partition("[")
        return function == self.test and self.case in bracket + case


def marked() -> list[Fault]:
    """Return the faults that tests are marked with, in the page's order."""
    order = list(GROUPS)
    return sorted(read_marks("fault", Fault), key=lambda fault: order.index(fault.group))


def page(faults: Sequence[Fault], seen: Mapping[Fault, str]) -> str:
    parts = [_ABOUT.format(count=len(faults))]
    for group, title in GROUPS.items():
        rows = [_row(fault, seen.get(fault, NOT_RUN)) for fault in faults if fault.group == group]
        parts.append("\n".join([f"## {title}\n", _HEAD, *rows, ""]))
    return "\n".join(parts)


def _row(fault: Fault, seen: str) -> str:
    cells = [fault.what, fault.by, fault.promise, f"`{fault.test}`", seen]
    assert not any("|" in cell for cell in cells), cells
    return f"| {' | '.join(cells)} |"


def seen_on(text: str, faults: Iterable[Fault]) -> dict[Fault, str]:
    """Return what a page says was seen of each fault that it has."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {(what, test): seen for what, _, _, test, seen in rows}
    keys = {fault: (fault.what, f"`{fault.test}`") for fault in faults}
    return {fault: cells[key] for fault, key in keys.items() if key in cells}


class ReliabilityPage:
    """A pytest plugin that writes the page at the end of a session that has injected faults. What
    it did not inject stays as it was seen before."""

    def __init__(self, path: Path = PAGE, faults: Sequence[Fault] | None = None) -> None:
        self._path = path
        self._faults = marked() if faults is None else faults
        self._outcomes: dict[Fault, Counter[str]] = {}
        self._figures: dict[Fault, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test ends with its call, or with a set-up or tear-down that did not pass.
        if report.skipped or (report.when != "call" and report.passed):
            return
        figures = [str(value) for name, value in report.user_properties if name == FIGURE]
        for fault in self._faults:
            if fault.is_injected_by(report.nodeid):
                self._outcomes.setdefault(fault, Counter())[report.outcome] += 1
                self._figures.setdefault(fault, []).extend(figures)

    def pytest_sessionfinish(self) -> None:
        if not self._outcomes:
            return
        before = self._path.read_text() if self._path.exists() else ""
        seen = seen_on(before, self._faults)
        for fault, outcomes in self._outcomes.items():
            told = _told(outcomes, sorted({*self._figures[fault]}))
            seen[fault] = _joined(seen.get(fault, ""), told, on_vllm=_is_on_vllm(fault))
        self._path.write_text(page(self._faults, seen))


def _told(outcomes: Counter[str], figures: Iterable[str]) -> str:
    counts = [
        f"{count} case{'s' * (count > 1)} {outcome}" for outcome, count in sorted(outcomes.items())
    ]
    return ", ".join([*counts, *figures])


def _joined(before: str, told: str, on_vllm: bool) -> str:
    """Return what was seen on each engine, with what one of them has seen now."""
    parts = [part for part in before.split("; ") if part not in ("", NOT_RUN)]
    others = [part for part in parts if part.startswith(_ON_VLLM) != on_vllm]
    now = [_ON_VLLM + told] if on_vllm else [told]
    return "; ".join(sorted(now + others, key=lambda part: part.startswith(_ON_VLLM)))


def _is_on_vllm(fault: Fault) -> bool:
    return fault.test.startswith("tests/vllm/") or os.environ.get("INFUSE_ENGINE") == "vllm"
