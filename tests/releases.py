"""An earlier release of this repository, to run beside the present one."""

import subprocess
import tarfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BEFORE = "be72858"
"""The last commit before the chain of a journal."""


def unpacked(folder: Path, *paths: str) -> Path:
    """Unpack paths of the earlier release into a folder; skip the test where the clone has none."""
    archive = folder / "release.tar"
    command = ["git", "archive", "--output", archive, BEFORE, *paths]
    if subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True).returncode:
        pytest.skip("the earlier commit is not in this clone")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder
