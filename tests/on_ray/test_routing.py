"""Which replica a request goes to."""

from collections import Counter

import pytest

pytest.importorskip("ray")

from server.on_ray.routing import first_free, ranked

REPLICAS = [f"replica{number}" for number in range(8)]


def test_a_replica_more_or_less_moves_only_what_it_gets_or_had() -> None:
    for number in range(200):
        before, after = (ranked(each, f"{number}-x")[0] for each in (REPLICAS, REPLICAS[:-1]))
        had = ranked(REPLICAS, f"{number}-x")[:2]
        assert before == after or REPLICAS[-1] in had


def test_an_adapter_has_two_homes_among_which_prompts_choose() -> None:
    first = {ranked(REPLICAS, f"adapter-{beginning}")[0] for beginning in range(100)}

    assert len(first) == 2


def test_adapters_are_spread_over_all_replicas() -> None:
    first = Counter(ranked(REPLICAS, f"{adapter}-x")[0] for adapter in range(800))

    assert set(first) == set(REPLICAS)
    assert max(first.values()) < 150


def test_every_order_of_replicas_gives_the_same_ranks() -> None:
    assert ranked(REPLICAS[::-1], "a-b") == ranked(REPLICAS, "a-b")


def test_a_replica_that_is_much_busier_than_others_is_passed_over() -> None:
    order = ranked(REPLICAS, "a-b")
    busy = dict.fromkeys(REPLICAS, 3)

    assert first_free(order, busy) == order[0]
    assert first_free(order, busy | {order[0]: 7}) == order[0]
    assert first_free(order, busy | {order[0]: 8}) == order[1]
