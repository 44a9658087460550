"""The capacity plan says what the committed figures give, and what is simulated holds together."""

import json
from typing import Any

import pytest

pytest.importorskip("ray")

from benchmarks import capacity, report, store_requests
from benchmarks.bench import ROWS
from benchmarks.fleet import Fleet, Speed, run
from benchmarks.sections.memory import RESIDENT

SPEED = Speed(step=0.02, token=0.001, fill=0.008)


def simulated(**more: Any) -> dict[str, Any]:
    """Ten replicas that have room for a fifth of the adapters each."""
    fleet = {"replicas": 10, "adapters": 100, "routing": "by adapter", "load": 0.7, "slots": 32}
    return run(Fleet(**fleet | {"speed": SPEED, "warm_up": 200, "requests": 20} | more))


def test_the_page_is_what_the_committed_figures_give() -> None:
    page = text = capacity.PAGE.read_text()
    for name, table in capacity.tables(json.loads(capacity.RESULTS.read_text())).items():
        text = capacity.with_table(text, name, table)

    assert page == text, "run python -m benchmarks.capacity --only-page"


def test_an_adapter_takes_what_the_bank_of_a_server_was_measured_to_take() -> None:
    slots, memory = max(RESIDENT), report.results()["memory"]["in_use"][0]

    assert (slots + 2 + ROWS) * capacity.bytes_of("SmolLM2-135M") == memory["bank"]


def test_replicas_that_are_chosen_by_adapter_fill_fewer_slots() -> None:
    by_adapter, by_load = simulated(), simulated(routing="by load alone")

    assert by_adapter["fills_per_request"] < 0.5 * by_load["fills_per_request"]


def test_an_adapter_that_host_memory_has_is_not_read() -> None:
    long = {"routing": "by load alone", "warm_up": 2000}

    assert simulated(**long, host_adapters=100)["reads_per_request"] < 0.01
    assert simulated(**long)["reads_per_request"] > 0.05


def test_the_same_seed_gives_the_same_figures() -> None:
    assert simulated() == simulated()


def test_a_fleet_at_its_saturation_keeps_up_and_beyond_it_does_not() -> None:
    waits = [simulated(load=load, requests=200)["ttft_ms"]["p99"] for load in (0.5, 0.9, 1.5)]

    assert waits[0] < waits[1] < 1000 < waits[2]


def test_what_a_server_asks_of_a_bucket_at_rest_does_not_grow_with_the_others() -> None:
    few, many = (store_requests.count(servers)["per_server_and_second"] for servers in (2, 8))

    assert few == pytest.approx(many, rel=0.05)


def test_a_change_is_shown_by_each_server_and_waits_for_all() -> None:
    alone, among = (store_requests.count(servers) for servers in (1, 8))

    assert alone["per_change"]["PUT"] == 1
    assert among["per_change"]["PUT"] == pytest.approx(8, abs=0.5)
    assert alone["change_seconds"] == 0
    assert 0.1 < among["change_seconds"] < 0.5
