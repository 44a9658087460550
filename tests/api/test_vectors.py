"""Vectors over HTTP: what an adapter and a combination do, and how alike adapters are."""

from typing import Any

import httpx
import pytest

from infuse.adapters.derive.combine import METHODS
from tests.api.conftest import RunningServer
from tests.api.oracle import upload
from tests.api.test_errors import error_of

ADAPTERS = "/v1/adapters"


def vectors_of(client: httpx.Client, name: str, **params: Any) -> dict[str, Any]:
    answer = client.get(f"{ADAPTERS}/{name}/vectors", params=params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def combined(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post(f"{ADAPTERS}/vectors", json=body)


def test_vectors_are_shown_by_module(client: httpx.Client) -> None:
    shown = vectors_of(client, "mlp", columns=4)

    assert shown["adapters"] == [{"name": "mlp@1", "weight": 1.0}]
    places = [(each["layer"], each["kind"], each["side"]) for each in shown["modules"]]
    down, up = (f"model.layers.*.mlp.{name}_proj" for name in ("down", "up"))
    assert places == [
        (layer, kind, side) for layer in (0, 1) for kind, side in ((down, "input"), (up, "output"))
    ]
    for each in shown["modules"]:
        assert len(each["columns"]) == 4
        assert len(each["histogram"]) == len(shown["bounds"]) - 1
        assert sum(each["histogram"]) == each["size"]


def test_columns_are_left_out_unless_asked_for(client: httpx.Client) -> None:
    assert all(each["columns"] == [] for each in vectors_of(client, "mlp")["modules"])


def test_each_revision_has_vectors_of_its_own(client: httpx.Client, server: RunningServer) -> None:
    upload(client, "changing", server.adapter_folders["mlp"])
    before = vectors_of(client, "changing")
    files = server.adapter_folders["queries"]
    upload(client, "changing", files, "PUT")

    assert vectors_of(client, "changing", revision=1) == before
    assert vectors_of(client, "changing")["modules"] == vectors_of(client, "queries")["modules"]
    assert error_of(client.get(f"{ADAPTERS}/changing/vectors?revision=9"), 404)
    client.delete(f"{ADAPTERS}/changing")


def test_a_disabled_adapter_can_be_looked_into(client: httpx.Client) -> None:
    client.patch(f"{ADAPTERS}/mlp", json={"enabled": False})
    try:
        assert vectors_of(client, "mlp")["modules"]
    finally:
        client.patch(f"{ADAPTERS}/mlp", json={"enabled": True})


@pytest.mark.parametrize("method", METHODS)
def test_a_combination_is_shown_as_it_would_be_stored(client: httpx.Client, method: str) -> None:
    parts = [{"name": "mlp", "weight": 0.5}, {"name": "queries@1", "weight": 0.25}]
    shown = combined(client, adapters=parts, method=method, columns=3).json()
    recipe = {"name": "stored", "adapters": parts, "method": method}
    assert client.post(f"{ADAPTERS}/combine", json=recipe).status_code == 201
    stored = vectors_of(client, "stored", columns=3)
    client.delete(f"{ADAPTERS}/stored")

    assert shown["modules"] == stored["modules"]
    assert [each["name"] for each in shown["adapters"]] == ["mlp@1", "queries@1"]


def test_similarity_names_the_revisions(client: httpx.Client) -> None:
    answer = client.post(f"{ADAPTERS}/similarity", json={"adapters": ["mlp", "queries@1", "mlp"]})

    assert answer.status_code == 200
    assert answer.json()["adapters"] == ["mlp@1", "queries@1", "mlp@1"]
    # They target different modules.
    assert answer.json()["similarity"] == [
        [pytest.approx(1), 0, pytest.approx(1)],
        [0, pytest.approx(1), 0],
        [pytest.approx(1), 0, pytest.approx(1)],
    ]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("similarity", {"adapters": []}, 400),
        ("similarity", {"adapters": ["nobody"]}, 404),
        ("similarity", {"adapters": ["mlp"], "of": 1}, 400),
        ("vectors", {"adapters": [{"name": "mlp"}], "method": "sum"}, 400),
        ("vectors", {"adapters": [{"name": "mlp@x"}], "method": "linear"}, 404),
        ("vectors", {"adapters": [{"name": "mlp"}], "method": "linear", "columns": -1}, 400),
    ],
)
def test_what_cannot_be_shown_is_refused(
    client: httpx.Client, path: str, body: dict[str, Any], status: int
) -> None:
    assert error_of(client.post(f"{ADAPTERS}/{path}", json=body), status)["message"]
