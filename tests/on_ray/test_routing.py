"""Which replica a request goes to."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from infuse.server.on_ray.affinity import MERGES
from infuse.server.on_ray.routing import choose, ranked


def replica(number: int, ready: bool = True) -> Any:
    return SimpleNamespace(
        replica_id=SimpleNamespace(unique_id=f"replica{number}"),
        replica_metadata={"number": number},
        routing_stats={"ready": ready},
    )


REPLICAS = [replica(number) for number in range(8)]


def idle(_: object) -> int:
    return 0


def test_a_replica_more_or_less_moves_only_what_it_gets_or_had() -> None:
    for number in range(200):
        before, after = (ranked(each, f"{number}-x") for each in (REPLICAS, REPLICAS[:-1]))
        assert before[0] is after[0] or REPLICAS[-1] in before[:2]


def test_an_adapter_has_two_homes_among_which_prompts_choose() -> None:
    first = [ranked(REPLICAS, f"adapter-{beginning}")[0] for beginning in range(100)]

    assert len({each.replica_id.unique_id for each in first}) == 2


def test_adapters_are_spread_over_all_replicas_also_where_all_prompts_begin_alike() -> None:
    first = Counter(
        ranked(REPLICAS, f"{adapter}-x")[0].replica_id.unique_id for adapter in range(800)
    )

    assert len(first) == len(REPLICAS)
    assert max(first.values()) < 150


def test_every_order_of_replicas_gives_the_same_ranks() -> None:
    assert ranked(REPLICAS[::-1], "a-b") == ranked(REPLICAS, "a-b")


@pytest.mark.parametrize(("requests", "rank"), [(3, 0), (7, 0), (8, 1)])
def test_a_replica_that_is_much_busier_than_others_is_passed_over(requests: int, rank: int) -> None:
    order = ranked(REPLICAS, "a-b")
    first, others = choose(REPLICAS, "a-b", lambda each: requests if each is order[0] else 3)

    assert first == [order[rank]]
    assert len(others) == len(REPLICAS) - 1


@pytest.mark.parametrize("affinity", ["a-b", "", MERGES])
def test_a_replica_that_is_not_ready_gets_no_requests_where_another_is(affinity: str) -> None:
    ready = replica(3)
    mixed = [replica(number, ready=False) for number in range(3)] + [ready]

    assert choose(mixed, affinity, idle)[0] == [ready]
    assert choose(mixed[:3], affinity, idle)[0]


def test_merges_go_to_the_lowest_number_and_nowhere_else() -> None:
    assert choose(REPLICAS[::-1], MERGES, idle) == [[REPLICAS[0]]]
