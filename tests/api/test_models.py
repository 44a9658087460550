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
