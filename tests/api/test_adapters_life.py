"""Rolling back, describing, switching off, pinning and combining adapters, over HTTP."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.api.conftest import RunningServer
from tests.api.oracle import upload
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually

ADAPTERS = "/v1/adapters"
BODY: dict[str, Any] = {
    "prompt": "The order arrived",
    "temperature": 0,
    "max_tokens": 12,
    "ignore_eos": True,
}


def text_of(client: httpx.Client, model: str, **more: Any) -> str:
    answer = client.post(COMPLETIONS, json=BODY | {"model": model} | more)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.fixture
def name(client: httpx.Client, adapter_folders: dict[str, Path]) -> Iterator[str]:
    """Revision 1 is `mlp`, revision 2 is `queries`."""
    assert upload(client, "moving", adapter_folders["mlp"]).status_code == 201
    assert upload(client, "moving", adapter_folders["queries"], "PUT").status_code == 200
    yield "moving"
    client.delete(f"{ADAPTERS}/moving")


# Revisions


def test_revisions_are_listed_with_where_they_came_from(client: httpx.Client, name: str) -> None:
    revisions = client.get(f"{ADAPTERS}/{name}/revisions").json()["data"]
    number = revisions[0]["revision"]

    assert [r["revision"] for r in revisions] == [number, number - 1]
    assert {r["source"] for r in revisions} == {"upload"}
    assert text_of(client, f"{name}@{number - 1}") == text_of(client, "mlp")


def test_a_rollback_is_a_new_revision_that_answers_as_the_old_one(
    client: httpx.Client, name: str
) -> None:
    current = client.get(f"{ADAPTERS}/{name}")
    number = current.json()["revision"]
    path = f"{ADAPTERS}/{name}/rollback"
    etag = {"If-Match": current.headers["etag"]}
    back = client.post(path, json={"revision": number - 1}, headers=etag)

    assert (back.status_code, back.json()["revision"]) == (200, number + 1)
    assert back.json()["source"] == f"rollback to {number - 1}"
    assert text_of(client, name) == text_of(client, "mlp")
    assert error_of(client.post(path, json={"revision": 1}, headers=etag), 412)
    again = client.post(path, json={"revision": number - 1})
    assert (again.json()["revision"], again.json()["unchanged"]) == (number + 1, True)


@pytest.mark.parametrize("body", [{}, {"revision": 0}, {"revision": "1"}, {"revison": 1}])
def test_a_rollback_that_names_no_revision_is_refused(
    client: httpx.Client, name: str, body: dict[str, Any]
) -> None:
    assert error_of(client.post(f"{ADAPTERS}/{name}/rollback", json=body), 400)["details"]


def test_a_rollback_to_what_never_was_is_404(client: httpx.Client, name: str) -> None:
    assert error_of(client.post(f"{ADAPTERS}/{name}/rollback", json={"revision": 999}), 404)
    assert error_of(client.post(f"{ADAPTERS}/nobody/rollback", json={"revision": 1}), 404)


# Details


def test_only_the_details_that_are_given_change(client: httpx.Client, name: str) -> None:
    client.patch(f"{ADAPTERS}/{name}", json={"description": "German", "tags": ["de"]})
    answer = client.patch(f"{ADAPTERS}/{name}", json={"tags": ["de", "it"]})

    assert answer.status_code == 200
    assert (answer.json()["description"], answer.json()["tags"]) == ("German", ["de", "it"])
    assert client.get(f"{ADAPTERS}/{name}").json() == answer.json()


@pytest.mark.parametrize(
    "body",
    [
        {"tagz": []},
        {"tags": "de"},
        {"pinned": 1},
        {"description": "x" * 5000},
        {"tags": ["x" * 200]},
    ],
)
def test_details_that_are_none_are_refused(
    client: httpx.Client, name: str, body: dict[str, Any]
) -> None:
    before = client.get(f"{ADAPTERS}/{name}").json()

    assert error_of(client.patch(f"{ADAPTERS}/{name}", json=body), 400)["details"]
    assert client.get(f"{ADAPTERS}/{name}").json() == before


def test_a_disabled_adapter_is_403_and_finishes_what_runs(
    client: httpx.Client, server: RunningServer, name: str
) -> None:
    whole = text_of(client, name, max_tokens=150)
    with client.stream(
        "POST", COMPLETIONS, json=BODY | {"model": name, "stream": True, "max_tokens": 150}
    ) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        client.patch(f"{ADAPTERS}/{name}", json={"enabled": False})
        refused = client.post(COMPLETIONS, json=BODY | {"model": name})
        events = [json.loads(line[6:]) for line in [first, *lines] if line.startswith("data: {")]

    assert error_of(refused, 403)["code"] == "adapter_disabled"
    assert "".join(event["choices"][0]["text"] for event in events) == whole
    client.patch(f"{ADAPTERS}/{name}", json={"enabled": True})
    assert text_of(client, name, max_tokens=150) == whole
    assert eventually(lambda: at_rest(server))


def test_a_pinned_adapter_is_resident_before_anyone_asks(
    start_server: Callable[..., tuple[str, Services]], adapter_folders: dict[str, Path]
) -> None:
    url, services = start_server(max_resident_adapters=2)
    with httpx.Client(base_url=url) as client:
        upload(client, "a", adapter_folders["mlp"])
        upload(client, "b", adapter_folders["queries"])
        assert client.patch(f"{ADAPTERS}/a", json={"pinned": True}).json()["pinned"]
        assert eventually(lambda: services.registry.stats().resident == 1)
        refused = client.patch(f"{ADAPTERS}/b", json={"pinned": True})

        assert error_of(refused, 409)["code"] == "too_many_pinned"
        assert not client.get(f"{ADAPTERS}/b").json()["pinned"]


# Combining


@pytest.fixture
def combined(client: httpx.Client) -> Iterator[str]:
    yield "both"
    client.delete(f"{ADAPTERS}/both")


def parts(*names: str, weight: float = 1.0) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name in names]


def test_a_combined_adapter_answers_like_the_mixture(client: httpx.Client, combined: str) -> None:
    recipe = {"adapters": parts("default", "queries", weight=0.5), "method": "linear"}
    made = client.post(f"{ADAPTERS}/combine", json={"name": combined, **recipe})

    assert made.status_code == 201, made.text
    assert made.headers["location"] == f"{ADAPTERS}/both"
    assert made.json()["source"] == "combine"
    assert [a["name"] for a in made.json()["recipe"]["adapters"]] == ["default@1", "queries@1"]
    mixture = {"adapters": recipe["adapters"], "composition": "linear"}
    assert text_of(client, combined) == text_of(client, "tiny", **mixture)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"name": "queries"}, 409),
        ({"name": "tiny"}, 409),
        ({"name": "../x"}, 400),
        ({"adapters": []}, 400),
        ({"adapters": [{"name": "nobody"}]}, 404),
        ({"adapters": [{"name": "queries@7"}]}, 404),
        ({"adapters": [{"name": "queries", "weight": "1"}]}, 400),
        ({"adapters": [{"name": "queries", "weigth": 1}]}, 400),
        ({"adapters": [{"name": "queries", "weight": 1e300}]}, 400),
        ({"method": "average"}, 400),
        ({"method": "ties", "density": 0}, 400),
        ({"method": "linear", "density": 0.5}, 400),
        ({"method": "ties", "missing": "zero"}, 400),
        ({"sed": 1}, 400),
    ],
    ids=str,
)
def test_a_recipe_that_cannot_be_cooked_is_refused_and_keeps_nothing(
    client: httpx.Client, change: dict[str, Any], status: int
) -> None:
    before = client.get(ADAPTERS).json()
    body = {"name": "both", "adapters": parts("default"), "method": "product"} | change

    assert error_of(client.post(f"{ADAPTERS}/combine", json=body), status)["message"]
    assert client.get(ADAPTERS).json() == before


def test_a_combination_far_from_one_is_made_with_a_warning(
    client: httpx.Client, combined: str
) -> None:
    body = {"name": combined, "adapters": parts("default", "queries"), "method": "linear"}
    [warning] = client.post(f"{ADAPTERS}/combine", json=body).json()["warnings"]

    assert "sum to 2" in warning
