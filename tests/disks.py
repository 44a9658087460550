"""Disks that fail as real ones do: full, read-only, frozen, broken or gone. Root mounts them."""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_MEBIBYTE = 1 << 20
_SHUTDOWN = 0x8004587D
"""The kernel's EXT4_IOC_SHUTDOWN."""
_WITHOUT_LOG = 2
"""Lose what was not synced, as a machine does that loses its power."""


def _can_mount() -> bool:
    """Whether this process may mount, has loop devices, and can make a file system."""
    if shutil.which("mkfs.ext4") is None or not Path("/dev/loop-control").exists():
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


mounts = pytest.mark.skipif(
    not _can_mount(), reason="mounts disks: needs root, loop devices and mkfs.ext4"
)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size: int, files: int = 1000) -> Iterator[Path]:
    """Within: a folder is a file system with room for so many bytes and files."""
    folder.mkdir()
    _run("mount", "-t", "tmpfs", "-o", f"size={size},nr_inodes={files}", "none", folder)
    try:
        yield folder
    finally:
        _run("umount", "--lazy", folder)


def fill(folder: Path, but: int = 0) -> Path:
    """Fill a disk with one file, but for so many bytes. Return the file."""
    filler = folder / "filler"
    left = os.statvfs(folder)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, left.f_bavail * left.f_frsize - but))
    return filler


class Disk:
    """An ext4 file system in a file, at `folder`."""

    def __init__(self, image: Path, folder: Path) -> None:
        self._image = image
        self.folder = folder

    @property
    def _device(self) -> str:
        command = ["findmnt", "--noheadings", "--output", "SOURCE", str(self.folder)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def mount(self) -> None:
        # What the file system cannot write makes it read-only, as distributions have it.
        _run("mount", "-o", "loop,errors=remount-ro", self._image, self.folder)

    def unmount(self) -> None:
        """Take the disk away from its folder; files that are open stay open."""
        _run("umount", "--lazy", self.folder)

    def freeze(self) -> None:
        """Let everything that writes wait."""
        _run("fsfreeze", "--freeze", self.folder)

    def thaw(self) -> None:
        _run("fsfreeze", "--unfreeze", self.folder)

    def become_read_only(self) -> None:
        """As a file system does that has found itself to be damaged."""
        trigger = Path("/sys/fs/ext4", Path(self._device).name, "trigger_fs_error")
        trigger.write_text("1")

    def lose_sectors(self) -> None:
        """What is not in memory cannot be read any more, and nothing be written."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.truncate(self._image, 256 << 10)
        _run("losetup", "--set-capacity", self._device)

    def lose_power(self) -> None:
        """Lose what was not synced; nothing is read or written any more."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(descriptor)


@contextmanager
def disk(parent: Path, size: int = 32 * _MEBIBYTE) -> Iterator[Disk]:
    """Within: a disk of its own is mounted below `parent`."""
    image, folder = parent / "disk.img", parent / "disk"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    _run("mkfs.ext4", "-q", image)
    made = Disk(image, folder)
    made.mount()
    try:
        yield made
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=False, capture_output=True)
        made.unmount()
