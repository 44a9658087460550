"""Which files of a folder a call passes, and in which order."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from types import FrameType


@cache
def _real(file: str) -> Path:
    """Where a file lies: packages are imported by a link to their folder."""
    return Path(file).resolve()


class Way:
    """The calls of functions in a folder, on every thread that begins meanwhile."""

    def __init__(self, folder: Path, route: str) -> None:
        """`route`: the file in the folder that calls the stages. Schemas are not noted."""
        self._folder = folder
        self._route = route
        self._frames: list[FrameType] = []
        """Kept, so that a coroutine or generator that goes on is not taken for a new call."""
        self.entered: list[str] = []
        """The file of each function that was called."""
        self._called_by_the_route: list[str] = []

    @property
    def stages(self) -> list[str]:
        """The files whose functions the route's own file called: one for each time that it turned
        to another."""
        return [file for file, _ in groupby(self._called_by_the_route)]

    @contextmanager
    def followed(self) -> Iterator[None]:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        file = self._file(frame)
        if event != "call" or file is None or frame in self._frames:
            return
        self._frames.append(frame)
        self.entered.append(file)
        leaves_a_block = frame.f_code.co_name == "__exit__"
        if self._caller(frame) == self._route and file != self._route and not leaves_a_block:
            self._called_by_the_route.append(file)

    def _file(self, frame: FrameType) -> str | None:
        """The file of the folder that a frame is in; None for others, and for schemas."""
        path = _real(frame.f_code.co_filename)
        if not path.is_relative_to(self._folder) or path.stem.endswith("schemas"):
            return None
        return str(path.relative_to(self._folder))

    def _caller(self, frame: FrameType) -> str | None:
        """The file of the nearest caller in the folder."""
        caller = frame.f_back
        while caller is not None and self._file(caller) is None:
            caller = caller.f_back
        return None if caller is None else self._file(caller)
