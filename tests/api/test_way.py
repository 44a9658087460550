"""The way of a chat request through `server/api/` is the one that the architecture page draws."""

import asyncio
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import FrameType

import httpx
import pytest

from server.app import create_app
from server.settings import Settings
from tests.api.test_streaming import CHAT

ROOT = Path(__file__).parents[2]
API = ROOT / "server" / "api"
ROUTE = "chat.py"
PAGE = ROOT / "docs" / "internals" / "architecture.md"


class Trace:
    """The calls of functions in `server/api/`, on every thread that begins meanwhile."""

    def __init__(self) -> None:
        self._frames: list[FrameType] = []
        """Kept, so that a coroutine that goes on is not taken for a new call."""
        self.entered: list[str] = []
        """The file of each function that was called."""
        self.called_by_the_route: list[str] = []
        """The same, of functions that the route's own file called."""

    @contextmanager
    def on(self) -> Iterator[None]:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        file = _file(frame)
        if event != "call" or file is None or frame in self._frames:
            return
        self._frames.append(frame)
        self.entered.append(file)
        leaves_a_block = frame.f_code.co_name == "__exit__"
        if _caller(frame) == ROUTE and file != ROUTE and not leaves_a_block:
            self.called_by_the_route.append(file)


def _file(frame: FrameType) -> str | None:
    """The file of `server/api/` that a frame is in; None for others, and for schemas."""
    path = Path(frame.f_code.co_filename)
    return path.name if path.parent == API and not path.stem.endswith("schemas") else None


def _caller(frame: FrameType) -> str | None:
    """The file of the nearest caller in `server/api/`."""
    caller = frame.f_back
    while caller is not None and _file(caller) is None:
        caller = caller.f_back
    return None if caller is None else _file(caller)


@pytest.fixture
def trace(model_folder: Path, tmp_path: Path) -> Trace:
    """The trace of one chat request, which is answered on the test's own thread."""
    app = create_app(Settings(model=str(model_folder), adapters_dir=tmp_path / "store"))
    trace = Trace()

    async def ask() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
                with trace.on():
                    return await client.post(CHAT, json=body | {"max_tokens": 3})

    assert asyncio.run(ask()).status_code == 200
    return trace


def test_a_request_enters_files_in_the_order_that_the_architecture_page_lists(
    trace: Trace,
) -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", PAGE.read_text(), re.MULTILINE)

    assert list(dict.fromkeys(trace.entered)) == listed


def test_the_route_returns_to_no_stage_that_it_has_left(trace: Trace) -> None:
    stages = [file for file, _ in groupby(trace.called_by_the_route)]

    assert sorted(stages) == sorted(set(stages)), stages
    assert len(stages) > 5
