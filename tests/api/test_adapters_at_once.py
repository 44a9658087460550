"""Changes of one adapter at once: each that was acknowledged is there, and an ETag tells them."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Serve
from tests.api.stores import place as place
from tests.api.stores import serve as serve

ROUNDS = 20


def at_once(client: httpx.Client, bodies: list[dict[str, Any]], **more: Any) -> list[int]:
    """The statuses of PATCHes that begin together."""
    together = threading.Barrier(len(bodies))

    def patch(body: dict[str, Any]) -> int:
        together.wait()
        return client.patch(f"{ADAPTERS}/mine", json=body, **more).status_code

    with ThreadPoolExecutor(len(bodies)) as threads:
        return list(threads.map(patch, bodies))


def test_no_acknowledged_change_of_details_is_lost(
    serve: Serve, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        for number in range(ROUNDS):
            wanted = {
                "description": f"the {number}th",
                "tags": [str(number)],
                "enabled": bool(number % 2),
            }
            bodies = [{field: value} for field, value in wanted.items()]
            assert at_once(client, bodies) == [200, 200, 200]
            said = client.get(f"{ADAPTERS}/mine").json()
            assert {field: said[field] for field in wanted} == wanted


def test_of_changes_with_one_etag_one_is_made(
    serve: Serve, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        for number in range(ROUNDS):
            etag = client.get(f"{ADAPTERS}/mine").headers["etag"]
            bodies = [{"description": f"{number}{letter}"} for letter in "abc"]
            statuses = at_once(client, bodies, headers={"If-Match": etag})
            assert sorted(statuses) == [200, 412, 412]
            said = client.get(f"{ADAPTERS}/mine").json()["description"]
            assert said == bodies[statuses.index(200)]["description"]


def test_an_etag_covers_content_and_details_and_outlives_a_restart(
    serve: Serve, adapter_folders: dict[str, Path]
) -> None:
    mlp, queries = adapter_folders["mlp"], adapter_folders["queries"]
    form = {
        "config": (queries / "adapter_config.json").read_bytes(),
        "weights": (queries / "adapter_model.safetensors").read_bytes(),
    }
    with serve() as client:
        seen = upload(client, "mine", mlp).headers["etag"]
        patched = client.patch(f"{ADAPTERS}/mine", json={"description": "x"})
        etag = patched.headers["etag"]
        assert etag != seen
        assert client.get(f"{ADAPTERS}/mine").headers["etag"] == etag
        again = client.patch(f"{ADAPTERS}/mine", json={"description": "x"})
        assert again.headers["etag"] == etag
    with serve() as client:
        path = f"{ADAPTERS}/mine"
        assert client.get(path).headers["etag"] == etag
        stale = {"If-Match": seen}
        for answer in (
            client.patch(path, json={"tags": ["a"]}, headers=stale),
            client.put(path, files=form, headers=stale),
            client.post(f"{path}/rollback", json={"revision": 1}, headers=stale),
            client.delete(path, headers=stale),
        ):
            assert (answer.status_code, answer.headers["etag"]) == (412, etag)
        replaced = client.put(path, files=form, headers={"If-Match": etag})
        assert replaced.status_code == 200
        assert replaced.json()["description"] == "x"
        now = client.get(path).headers["etag"]
        assert now == replaced.headers["etag"] != etag
        back = client.post(f"{path}/rollback", json={"revision": 1}, headers={"If-Match": now})
        assert back.headers["etag"] == client.get(path).headers["etag"]
        headers = {"If-Match": back.headers["etag"]}
        assert client.delete(path, headers=headers).status_code == 204


@pytest.mark.parametrize("field", ["description", "tags"])
def test_an_empty_detail_is_a_change_as_any_other(
    serve: Serve, adapter_folders: dict[str, Path], field: str
) -> None:
    empty: Any = "" if field == "description" else []
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        client.patch(f"{ADAPTERS}/mine", json={"description": "x", "tags": ["a"]})
        assert client.patch(f"{ADAPTERS}/mine", json={field: empty}).json()[field] == empty
