"""Servers that share a store: what an operator changes on one, and a bucket that is away."""

import asyncio
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from infuse.adapters.storage.stored import StoredAdapters
from infuse.server.middleware import CatchUp
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Place, Serve, complete, error_of, text_of
from tests.api.stores import place as place
from tests.api.stores import serve as serve
from tests.bad_s3 import bad_s3


def until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def resident(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith("infuse_adapters_resident ")]
    return float(value)


def test_what_an_operator_sets_on_one_server_holds_on_the_other(
    serve: Serve, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    own = {"merges_dir": tmp_path / "others", "adapters_cache_dir": tmp_path / "another"}
    with serve(shared_store=True) as one, serve(shared_store=True, **own) as other:
        upload(one, "mine", adapter_folders["mlp"])
        assert text_of(other, "mine") == text_of(one, "mine")
        assert other.get("/v1/models/mine").status_code == 200
        seen = other.get(f"{ADAPTERS}/mine").headers["etag"]
        one.patch(f"{ADAPTERS}/mine", json={"enabled": False})
        assert error_of(complete(other, "mine"), 403)["code"] == "adapter_disabled"
        stale = other.patch(
            f"{ADAPTERS}/mine", json={"description": "x"}, headers={"If-Match": seen}
        )
        assert stale.status_code == 412
        other.delete(f"{ADAPTERS}/mine")
        assert complete(one, "mine").status_code == 404


def test_an_adapter_that_is_pinned_on_one_server_is_on_the_device_of_the_other(
    serve: Serve, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    own = {"merges_dir": tmp_path / "others", "adapters_cache_dir": tmp_path / "another"}
    with serve(shared_store=True) as one, serve(shared_store=True, **own) as other:
        upload(one, "mine", adapter_folders["mlp"])
        one.patch(f"{ADAPTERS}/mine", json={"pinned": True})
        until(lambda: resident(other) == 1)
        upload(one, "mine", adapter_folders["queries"], "PUT")
        until(lambda: resident(other) == 1)
        assert text_of(other, "mine") == text_of(one, "mine")
        other.delete(f"{ADAPTERS}/mine")
        until(lambda: resident(one) == 0)


@pytest.mark.fault(
    "bucket",
    "One of several servers does not reach the shared bucket",
    by="a proxy before the bucket",
    promise="After 0.8 of `--replica-lease` adapters and `/health/ready` are 503, the base is "
    "served; it goes on when it reaches the bucket.",
)
@pytest.mark.parametrize("place", ["in a bucket"], indirect=True)
def test_a_server_that_does_not_reach_its_bucket_says_so_and_the_base_still_answers(
    serve: Serve,
    place: Place,
    s3_server: str,
    adapter_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bad_s3(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with serve(shared_store=True, replica_lease=2) as client:
            upload(client, "mine", adapter_folders["mlp"])
            assert client.get("/health/ready").status_code == 200
            proxy.always("refuses")
            until(lambda: client.get("/health/ready").status_code == 503)
            for answer in (
                client.get("/health/ready"),
                complete(client, "mine"),
                complete(client, "nobody"),
                client.get("/v1/models/mine"),
                client.get(ADAPTERS),
            ):
                error = error_of(answer, 503)
                assert error["code"] == "storage_unavailable"
                assert f"has not reached {place.bucket}" in error["message"]
                assert answer.headers["Retry-After"] == "5"
            assert complete(client, "tiny").status_code == 200
            assert client.get("/health/live").status_code == 200
            assert client.get("/metrics").status_code == 200
            proxy.always(None)
            until(lambda: client.get("/health/ready").status_code == 200)
            assert complete(client, "mine").status_code == 200


class Stored:
    """A store that is behind for so many looks."""

    def __init__(self, behind: float) -> None:
        self._behind = behind
        self.looks = 0

    @property
    def is_behind(self) -> bool:
        self.looks += 1
        return self.looks <= self._behind


async def _ask(stored: Stored, requests: int) -> list[int]:
    """How often each of the requests has looked."""
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("here"))])
    transport = httpx.ASGITransport(CatchUp(app, cast(StoredAdapters, stored)))
    looks = [0]
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        for _ in range(requests):
            assert (await client.get("/")).text == "here"
            looks.append(stored.looks)
    return [after - before for before, after in pairwise(looks)]


def test_a_request_waits_while_its_server_is_behind_and_no_other_does_where_that_was_in_vain() -> (
    None
):
    assert asyncio.run(_ask(Stored(0), 2)) == [1, 1]
    assert asyncio.run(_ask(Stored(5), 2)) == [6, 1]
    first, *others = asyncio.run(_ask(Stored(math.inf), 3))
    assert first > 5
    assert others == [2, 2]
