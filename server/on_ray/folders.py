"""The folder that each replica has for itself beside the store."""

import fcntl
import itertools
from pathlib import Path
from typing import IO


class OwnFolder:
    """A numbered folder that no other process uses. Its number is free again when its process has
    ended: a replica takes the folder, and the merges in it, of the one that it replaces."""

    def __init__(self, parent: Path) -> None:
        for number in itertools.count():
            path = parent / str(number)
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / "lock").open("w")
            if _is_taken(lock):
                lock.close()
                continue
            self.path, self.number, self._lock = path, number, lock
            return


def _is_taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False
