"""Temporary folders that a killed process leaves for no longer than until the next one comes."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp


class _Held:
    """A folder that is open and locked. The lock ends with the process, however that ends."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError where another process holds it."""
        self.folder = folder
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._handle)


@contextmanager
def scratch_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder below `parent`, gone afterwards. What killed processes have left there under
    this prefix is removed first."""
    for left in parent.glob(f"{prefix}*"):
        # Another one holds it, or has removed it.
        with suppress(OSError), closing(_Held(left)):
            shutil.rmtree(left, ignore_errors=True)
    with closing(_made(parent, prefix)) as held:
        try:
            yield held.folder
        finally:
            shutil.rmtree(held.folder, ignore_errors=True)


def _made(parent: Path, prefix: str) -> _Held:
    while True:
        folder = Path(mkdtemp(prefix=prefix, dir=parent))
        # Before it is locked, another process may take it for one that was left.
        with suppress(OSError):
            held = _Held(folder)
            if folder.exists():
                return held
            held.close()
