"""Several adapters, or some of one, for a single request."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle
from tests.api.test_adapters_life import BODY, error_of, text_of
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually

BOTH = [{"name": "default"}, {"name": "queries"}]


def pefts_text(model_folder: Path, folders: dict[str, Path], *names: str) -> str:
    """PEFT with several active adapters."""
    oracle = Oracle(model_folder, *(folders[name] for name in names))
    return oracle.text(oracle.greedy(BODY["prompt"], BODY["max_tokens"]))


def test_a_mixture_is_pefts_product_of_active_adapters(
    client: httpx.Client,
    server: RunningServer,
    model_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    wanted = pefts_text(model_folder, adapter_folders, "default", "queries")

    assert text_of(client, "tiny", adapters=BOTH) == wanted
    assert eventually(lambda: at_rest(server))


@pytest.mark.parametrize(("strength", "like"), [(0.0, None), (1.0, "default")])
def test_strength_runs_from_the_base_to_the_adapter(
    client: httpx.Client,
    model_folder: Path,
    adapter_folders: dict[str, Path],
    strength: float,
    like: str | None,
) -> None:
    oracle = Oracle(model_folder, adapter_folders.get(like or ""))
    wanted = oracle.text(oracle.greedy(BODY["prompt"], BODY["max_tokens"]))

    assert text_of(client, "default", strength=strength) == wanted


def test_more_of_an_adapter_is_the_same_as_a_weight(client: httpx.Client) -> None:
    twice = [{"name": "default", "weight": 2}]

    assert text_of(client, "default", strength=2) == text_of(client, "tiny", adapters=twice)


def test_a_mixture_says_what_answered_and_is_counted_as_one(client: httpx.Client) -> None:
    adapters = [{"name": "default", "weight": 0.5}, {"name": "queries@1"}]
    answer = client.post(COMPLETIONS, json=BODY | {"model": "tiny", "adapters": adapters})

    assert answer.headers["infuse-adapter"] == "product(default@1*0.5,queries@1*1)"
    assert answer.json()["model"] == "tiny"
    assert 'infuse_requests_total{adapter="mixture"' in client.get("/metrics").text


def test_equal_mixtures_under_other_names_share_a_slot(
    client: httpx.Client, server: RunningServer
) -> None:
    text_of(client, "tiny", adapters=[{"name": "default", "weight": 0.25}])
    swaps = server.services.registry.stats().swaps
    text_of(client, "default", strength=0.25)
    text_of(client, "tiny", adapters=[{"name": "default@1", "weight": 0.25}])

    assert server.services.registry.stats().swaps == swaps


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "default", "adapters": BOTH}, 400, "model"),
        ({"adapters": []}, 400, "adapters"),
        ({"adapters": BOTH * 9}, 400, "adapters"),
        ({"adapters": [{"name": "nobody"}]}, 404, "model"),
        ({"adapters": [{"name": "default", "weight": 99}]}, 400, "adapters.0.weight"),
        ({"adapters": [{"nme": "default"}]}, 400, "adapters.0.name"),
        ({"adapters": BOTH, "strength": 1}, 400, "strength"),
        ({"adapters": BOTH, "composition": "ties"}, 400, "composition"),
        ({"composition": "linear"}, 400, "composition"),
        ({"strength": 0.5}, 400, "strength"),
        ({"model": "default", "strength": 17}, 400, "strength"),
    ],
    ids=str,
)
def test_a_mixture_that_makes_no_sense_is_named(
    client: httpx.Client, server: RunningServer, change: dict[str, Any], status: int, param: str
) -> None:
    error = error_of(client.post(COMPLETIONS, json=BODY | {"model": "tiny"} | change), status)

    assert error["param"] == param
    assert at_rest(server)
