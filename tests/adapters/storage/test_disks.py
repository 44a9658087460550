"""The store on disks that have no room, or cannot be read or written, at any moment of a change."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest

from tests.adapters.storage.test_store_failures import CHANGES, change_until_there_is_room
from tests.disks import fill, mounts, small_disk

pytestmark = mounts
_BLOCK = 4096


def less_and_less_full(folder: Path, of: str) -> Iterator[None]:
    """A disk with no blocks or files left, then with one, with two, …"""
    disk = folder.parent
    if of == "blocks":
        filler = fill(disk)
        while True:
            yield
            os.truncate(filler, filler.stat().st_size - _BLOCK)
    fillers = (disk / f"filler-{number}" for number in count())
    made = []
    while os.statvfs(disk).f_favail:
        made.append(next(fillers))
        made[-1].touch()
    while True:
        yield
        made.pop().unlink()


@pytest.mark.fault(
    "disk",
    "The disk has no bytes left at any moment of a change",
    by="a tmpfs with no free block, then one, two, …",
    promise="The change says that the disk is full, and leaves everything as it was, in memory, on "
    "the disk and at the next start.",
    case="blocks",
)
@pytest.mark.fault(
    "disk",
    "The disk has no inodes left at any moment of a change",
    by="a tmpfs with no free inode, then one, two, …",
    promise="As where it has no bytes left.",
    case="files",
)
@pytest.mark.parametrize("of", ["blocks", "files"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_disk_without_room_at_any_moment_leaves_everything_as_it_was(
    tmp_path: Path, change: str, of: str
) -> None:
    with small_disk(tmp_path / "disk", 1 << 20, files=60) as disk:
        folder = disk / "store"
        attempts = (nullcontext() for _ in less_and_less_full(folder, of))
        change_until_there_is_room(folder, change, attempts)
