"""`GET /v1/models` on a real server."""

from pathlib import Path

import httpx
import pytest

from tests.api.conftest import RunningServer


def test_the_base_comes_first_and_every_adapter_names_it(
    client: httpx.Client, server: RunningServer, adapter_folders: dict[str, Path]
) -> None:
    base = server.services.model_name

    listed = client.get("/v1/models").json()

    assert listed["object"] == "list"
    first, *others = listed["data"]
    assert (first["id"], first["root"], first["parent"]) == (base, base, None)
    assert adapter_folders.keys() <= {model["id"] for model in others}
    for model in others:
        assert model["object"] == "model"
        assert model["owned_by"] == "infuse"
        assert model["parent"] == base
        assert model["root"].startswith(model["id"] + "@")
        assert model["created"] > 1_700_000_000


def test_a_model_is_looked_up_by_its_name(
    client: httpx.Client, server: RunningServer, adapter_folders: dict[str, Path]
) -> None:
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}

    for name in (server.services.model_name, *adapter_folders):
        assert client.get(f"/v1/models/{name}").json() == listed[name]


def test_a_revision_is_a_model_too(client: httpx.Client, adapter_folders: dict[str, Path]) -> None:
    name = next(iter(adapter_folders))

    model = client.get(f"/v1/models/{name}@1").json()

    assert (model["id"], model["root"]) == (f"{name}@1", f"{name}@1")


@pytest.mark.parametrize("suffix", ["@99", "@0", "@-1", "@x", "@", "@1@1", "@²", "-unknown"])
def test_an_unknown_model_is_not_found(
    client: httpx.Client, adapter_folders: dict[str, Path], suffix: str
) -> None:
    name = next(iter(adapter_folders))

    response = client.get(f"/v1/models/{name}{suffix}")

    assert response.status_code == 404
    error = response.json()["error"]
    assert error["code"] == "model_not_found"
    assert "/v1/models" in error["message"]


def test_a_name_like_a_path_is_not_found(client: httpx.Client) -> None:
    response = client.get("/v1/models/..%2f..%2fetc%2fpasswd")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_every_model_says_how_long_it_reads(client: httpx.Client, server: RunningServer) -> None:
    listed = client.get("/v1/models").json()["data"]

    window = server.services.engine.model.max_model_len
    assert {model["max_model_len"] for model in listed} == {window}


def test_a_slash_at_the_end_changes_nothing(client: httpx.Client) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
def test_pages_join_to_the_whole_list(client: httpx.Client, limit: int) -> None:
    whole = client.get("/v1/models").json()
    pages: list[str] = []
    after: str | None = None
    while True:
        query = {"limit": limit} | ({} if after is None else {"after": after})
        page = client.get("/v1/models", params=query).json()
        assert 0 < len(page["data"]) <= limit
        pages += [model["id"] for model in page["data"]]
        after = page["next"]
        if after is None:
            break
        assert after == pages[-1]

    assert pages == [model["id"] for model in whole["data"]]
    assert whole["next"] is None


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "x"])
def test_a_page_of_no_size_is_refused(client: httpx.Client, limit: str) -> None:
    response = client.get("/v1/models", params={"limit": limit})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"
