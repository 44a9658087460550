"""`--report FILE`: which tests ran where, and how they ended, for people who did not run them."""

import importlib.metadata
import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "fastapi", "hypothesis", "lm_eval")


class Report:
    """A pytest plugin that counts, and writes when the session ends.

    With pytest-xdist, its processes know what is deselected, and the one that started them hears
    how the tests went.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        """Folder -> outcome -> tests."""
        self._seconds: Counter[str] = Counter()
        """Folder -> set-up, run and tear-down of its tests."""
        self._of_full: dict[str, Counter[str]] = defaultdict(Counter)
        """Test function marked full -> outcome -> cases."""
        self._seconds_of_full: Counter[str] = Counter()
        self._skipped: list[tuple[str, str]] = []
        self._deselected: Counter[str] = Counter()

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._deselected.update(_function(item.nodeid) for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # All processes collect the same tests.
        self._deselected = Counter(node.workeroutput["deselected"])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        function, is_full = _function(report.nodeid), "full" in report.keywords
        folder = str(Path(report.nodeid.partition("::")[0]).parent)
        self._seconds[folder] += report.duration
        if is_full:
            self._seconds_of_full[function] += report.duration
        # A test ends with its call, or with a set-up or tear-down that did not pass.
        if report.when == "call" or not report.passed:
            self._outcomes[folder][report.outcome] += 1
            if is_full:
                self._of_full[function][report.outcome] += 1
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skipped.append((report.nodeid, report.longrepr[2]))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected"] = dict(self._deselected)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("\n".join(self._lines()) + "\n")

    def _lines(self) -> Iterable[str]:
        # This imports torch, which none of the processes need for the rest.
        from benchmarks.machine import machine

        where = machine()
        versions = [f"Python {platform.python_version()}"]
        installed = {each.name: each.version for each in importlib.metadata.distributions()}
        versions += [f"{name} {installed[name]}" for name in _PACKAGES if name in installed]
        total: Counter[str] = sum(self._outcomes.values(), Counter())
        yield "# Test report"
        yield ""
        yield "Written by `make test-full`; not by hand."
        yield ""
        yield "| | |"
        yield "|---|---|"
        yield f"| date | {where['date']} |"
        yield f"| commit | {where['commit']} |"
        yield f"| machine | {where['cpu']}, {where['cores']} cores, {', '.join(where['vector'])} |"
        yield f"| versions | {', '.join(versions)} |"
        yield f"| outcome | {_told(total)} |"
        yield f"| tests' time | {sum(self._seconds.values()) / 60:.1f} minutes |"
        yield ""
        yield from _table("tests in", self._outcomes, self._seconds)
        yield ""
        yield "## Only in `make test-full`"
        yield ""
        yield from _table("test", self._of_full, self._seconds_of_full)
        yield ""
        yield "## Not run"
        yield ""
        for name, reason in self._skipped:
            yield f"- `{name}`: {reason}"
        for name, count in sorted(self._deselected.items()):
            yield f"- `{name}`: {count} deselected"
        if not (self._skipped or self._deselected):
            yield "Nothing was skipped or deselected."


def _function(nodeid: str) -> str:
    return nodeid.partition("[")[0]


def _told(outcomes: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "none"


def _table(heading: str, outcomes: dict[str, Counter[str]], seconds: Counter[str]) -> Iterable[str]:
    yield f"| {heading} | outcome | seconds |"
    yield "|---|---|---|"
    for name in sorted(outcomes):
        yield f"| `{name}` | {_told(outcomes[name])} | {seconds[name]:.1f} |"
