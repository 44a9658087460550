"""Temporary folders that a killed process leaves for no longer than until the next one comes."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder below `parent`, gone afterwards. What killed processes have left there under
    this prefix is removed first: a folder is locked as long as its process lives."""
    for left in parent.glob(f"{prefix}*"):
        _remove_if_left(left)
    folder, handle = _made(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_if_left(folder: Path) -> None:
    # Another process may hold it, or have removed it.
    with suppress(OSError):
        handle = os.open(folder, _FOLDER)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)


def _made(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new folder, and its handle, which locks it."""
    while True:
        folder = Path(mkdtemp(prefix=prefix, dir=parent))
        # Before it is locked, another process may take it for one that was left.
        with suppress(FileNotFoundError):
            handle = os.open(folder, _FOLDER)
            # Some network file systems lock no folders: there, none is ever taken so.
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if folder.exists():
                return folder, handle
            os.close(handle)
