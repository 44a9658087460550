"""`infuse merges …` follows the merges of a server."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.commands.conftest import Infuse, Typed

pytestmark = pytest.mark.usefixtures("added")


@pytest.fixture
def merge(http: httpx.Client, infuse: Infuse) -> Iterator[str]:
    """The id of a merge that has succeeded."""
    parts = [{"name": "first", "weight": 0.5}, {"name": "second"}]
    answer: dict[str, Any] = http.post("/v1/merges", json={"adapters": parts}).json()
    assert infuse("merges", "wait", answer["id"]).exit_code == 0
    yield answer["id"]
    http.delete(f"/v1/merges/{answer['id']}")


def test_a_merge_is_waited_for_listed_and_shown(infuse: Infuse, typed: Typed, merge: str) -> None:
    waited = infuse("merges", "wait", merge, "--json")
    [line] = infuse("merges", "list").stdout.splitlines()
    [listed] = json.loads(infuse("merges", "list", "--json").stdout)
    header, row = typed("merges", "list").splitlines()

    assert json.loads(waited.stdout)["state"] == "succeeded"
    assert line.split("\t")[:4] == [merge, "succeeded", "1.0", "product of first@2=0.5, second@1=1"]
    assert listed["id"] == merge
    assert header.split() == ["id", "state", "progress", "adapters", "size", "created"]
    assert "100%" in row
    assert "base\ttiny\n" in infuse("merges", "show", merge).stdout


def test_a_merge_that_has_ended_is_not_forgotten_by_cancelling_it(
    infuse: Infuse, merge: str
) -> None:
    refused = infuse("merges", "cancel", merge)

    assert (refused.exit_code, refused.stderr) == (1, f"{merge} has ended already: succeeded\n")
    assert infuse("merges", "show", merge).exit_code == 0


def test_a_merge_that_was_cancelled_ends_the_wait_with_status_1(
    infuse: Infuse, http: httpx.Client, gate: Any
) -> None:
    job = http.post("/v1/merges", json={"adapter": "first"}).json()["id"]
    assert gate.reached.wait(60)
    assert infuse("merges", "cancel", job).exit_code == 0
    gate.open.set()
    waited = infuse("merges", "wait", job)
    http.delete(f"/v1/merges/{job}")

    assert waited.exit_code == 1
    assert "state\tcancelled\n" in waited.stdout


def test_a_merge_that_nobody_knows_is_said(infuse: Infuse) -> None:
    for command in ("show", "wait", "cancel"):
        assert infuse("merges", command, "x").stderr == "There is no merge 'x'.\n"
