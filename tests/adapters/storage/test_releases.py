"""A store goes from a release before the chain to this one and back, at rest and under changes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from infuse.adapters.storage.audit import audit
from tests.releases import REPOSITORY, unpacked

Work = Callable[..., Mapping[str, Any]]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code of the earlier release."""
    return unpacked(tmp_path_factory.mktemp("release"), "adapters")


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, folder: Path) -> Path | str:
    return folder if request.param == "folder" else str(request.getfixturevalue("s3"))


@pytest.fixture
def work(place: Path | str, tmp_path: Path) -> Work:
    """Runs a worker with the code of a release."""
    numbers = count()

    def work(release: Path, how: str, names: str, first: int, last: int) -> Mapping[str, Any]:
        worker = [sys.executable, REPOSITORY / "tests/adapters/storage/release_worker.py"]
        cache = tmp_path / (f"cache{next(numbers)}" if how == "shared" else "cache")
        arguments = [place, cache, how, names, first, last]
        ran = subprocess.run(
            [str(each) for each in [*worker, *arguments]],
            env=os.environ | {"PYTHONPATH": str(release)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        found: Mapping[str, Any] = json.loads(ran.stdout)
        return found

    return work


def test_each_release_finds_what_the_other_has_left(
    work: Work, before: Path, place: Path | str
) -> None:
    left: Mapping[str, Any] = {}
    for turn, release in enumerate((before, REPOSITORY, before, REPOSITORY)):
        worked = work(release, "alone", "a", 12 * turn, 12 * (turn + 1))
        assert worked["found"] == left
        left = worked["left"]
    found = audit(place)
    assert found.unchained > 10
    assert all("is not chained" in fault for fault in found.faults)


def test_servers_of_both_releases_share_a_store(
    work: Work, before: Path, place: Path | str
) -> None:
    """As in a rolling upgrade, and in a downgrade after it."""
    with ThreadPoolExecutor() as threads:
        ways = {"a": before, "b": REPOSITORY}
        left = {
            names: threads.submit(work, release, "shared", names, 0, 30)
            for names, release in ways.items()
        }
    expected = {
        name: revisions
        for names, worked in left.items()
        for name, revisions in worked.result()["left"].items()
        if name.startswith(names)
    }
    assert len(expected) == 4
    for release in (REPOSITORY, before):
        assert work(release, "alone", "", 0, 0)["found"] == expected
    assert all("is not chained" in fault for fault in audit(place).faults)
