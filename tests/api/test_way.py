"""The way of a chat request through `server/api/` is the one that the architecture page draws."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest

from infuse.server.app import create_app
from infuse.server.settings import Settings
from tests.api.test_streaming import CHAT
from tests.way import Way

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "internals" / "architecture.md"


@pytest.fixture
def way(model_folder: Path, tmp_path: Path) -> Way:
    """Of one chat request, which is answered on the test's own thread."""
    app = create_app(Settings(model=str(model_folder), adapters_dir=tmp_path / "store"))
    way = Way(ROOT / "server" / "api", "chat.py")

    async def ask() -> httpx.Response:
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
                with way.followed():
                    return await client.post(CHAT, json=body | {"max_tokens": 3})

    assert asyncio.run(ask()).status_code == 200
    return way


def test_a_request_enters_files_in_the_order_that_the_architecture_page_lists(way: Way) -> None:
    listed = re.findall(r"^\| `(\w+\.py)` \|", PAGE.read_text(), re.MULTILINE)

    assert list(dict.fromkeys(way.entered)) == listed


def test_the_route_returns_to_no_stage_that_it_has_left(way: Way) -> None:
    assert sorted(way.stages) == sorted(set(way.stages)), way.stages
    assert len(way.stages) > 5
