"""What `make test-full` runs beyond `make test`, and what it says of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TESTS = """
import pytest

def test_short():
    pass

def test_of_elsewhere():
    pytest.skip("no such machine")

@pytest.mark.full
@pytest.mark.parametrize("family", ["a", "b"])
def test_long(family):
    assert family == "a"
"""


def run(folder: Path, *flags: str) -> tuple[str, str]:
    """The session's last line, and its report."""
    (folder / "test_some.py").write_text(TESTS)
    pytest_ = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--rootdir", str(REPOSITORY)]
    report = folder / "report.md"
    command = [*pytest_, "-c", str(REPOSITORY / "pyproject.toml"), "--report", str(report), *flags]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", str(folder)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        check=False,
    )
    return done.stdout.splitlines()[-1], report.read_text()


PROCESSES = ("-n", "2")


@pytest.mark.parametrize("flags", [(), pytest.param(PROCESSES, marks=pytest.mark.full)])
def test_a_test_marked_full_is_left_out_and_reported(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    last, report = run(tmp_path, *flags)

    assert "1 passed, 1 skipped" in last
    assert "outcome | 1 passed, 1 skipped |" in report
    assert "test_long`: 2 deselected" in report
    assert "no such machine" in report


@pytest.mark.parametrize(
    "flags", [("-m", "full", *PROCESSES), pytest.param(("--full",), marks=pytest.mark.full)]
)
def test_it_runs_when_asked_for(tmp_path: Path, flags: tuple[str, ...]) -> None:
    last, report = run(tmp_path, *flags)

    assert "1 failed" in last
    assert "test_long` | 1 failed, 1 passed |" in report
    assert "test_long`: 2 deselected" not in report
