"""Whether a request is let in: the queue is bounded, and a flood refuses only itself."""

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from adapters.residency import Lease
from server.engine.places import Places
from server.engine.request import GenerationRequest, SamplingParams

PLACES = 8


def request(tenant: str = "", adapter: str = "") -> GenerationRequest:
    lease = cast(Lease, SimpleNamespace(label=adapter)) if adapter else None
    params = SamplingParams(max_tokens=1)
    return GenerationRequest(id="", prompt=(1,), params=params, lease=lease, tenant=tenant)


def flooded(**like: Any) -> Places:
    places = Places(PLACES)
    assert places.take([request(**like)] * PLACES)
    assert not places.take([request(**like)])
    return places


def taken(places: Places, **like: Any) -> int:
    count = 0
    while places.take([request(**like)]):
        count += 1
    return count


def test_another_tenant_has_places_in_a_full_queue_up_to_an_even_part() -> None:
    places = flooded(tenant="flood")

    assert taken(places, tenant="b") == PLACES // 2
    assert taken(places, tenant="c") == PLACES // 3


def test_another_adapter_has_places_in_a_full_queue() -> None:
    places = flooded(adapter="flood")

    assert taken(places, adapter="b") == PLACES // 2
    assert taken(places) == 0, "half as many again were taken"


def test_a_free_place_is_anybodys() -> None:
    places = flooded(tenant="flood")
    places.leave(request(tenant="flood"))

    assert places.take([request(tenant="flood")])
    assert not places.take([request(tenant="flood")])


def test_an_order_that_does_not_fit_takes_no_place() -> None:
    places = Places(PLACES)

    assert not places.take([request()] * (PLACES + 1))
    assert places.take([request()] * PLACES)


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from(["", "x", "y"])),
        max_size=80,
    )
)
def test_places_are_bounded_and_an_empty_queue_lets_in(
    events: list[tuple[bool, str, str]],
) -> None:
    places = Places(PLACES)
    inside: list[GenerationRequest] = []
    for enters, tenant, adapter in events:
        if enters and places.take([request(tenant, adapter)]):
            inside.append(request(tenant, adapter))
        elif not enters and inside:
            places.leave(inside.pop(0))
        assert len(inside) <= 2 * PLACES
    for each in inside:
        places.leave(each)

    assert places.take([request()] * PLACES)
