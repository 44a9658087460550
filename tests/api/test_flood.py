"""Far more requests at once than the queue takes."""

import asyncio
from collections import Counter

import httpx
import pytest

from tests.api.conftest import ServeAdapters
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually

CONNECTIONS = 200
"""Requests of the flood at any time: more than places, fewer than files that a process may open."""
BODY = {"prompt": "The order arrived", "temperature": 0, "max_tokens": 4, "ignore_eos": True}


async def flood(url: str, requests: int) -> tuple[list[httpx.Response], list[httpx.Response]]:
    """The answers to so many requests on one adapter, and to one after the other on another as
    long as the flood lasts."""
    limits = httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=0)
    places = asyncio.Semaphore(CONNECTIONS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as many:

        async def ask() -> httpx.Response:
            async with places:
                return await many.post(COMPLETIONS, json=BODY | {"model": "default"})

        all_of_them = asyncio.gather(*(ask() for _ in range(requests)))
        others = []
        async with httpx.AsyncClient(base_url=url, timeout=120) as one:
            while not all_of_them.done():
                others.append(await one.post(COMPLETIONS, json=BODY | {"model": "mlp"}))
        return await all_of_them, others


@pytest.mark.fault(
    "network",
    "A flood of requests on one adapter",
    by="200 connections at once",
    promise="What the queue does not take is 429 with a time to come back; another adapter is "
    "served.",
)
@pytest.mark.parametrize(
    "requests", [500, pytest.param(10_000, marks=[pytest.mark.full, pytest.mark.timeout(900)])]
)
def test_a_flood_is_refused_with_a_time_to_come_back_and_another_adapter_still_served(
    serve_adapters: ServeAdapters, requests: int
) -> None:
    with serve_adapters(max_queue=8) as server:
        answers, others = asyncio.run(flood(server.base_url, requests))
        statuses = Counter(answer.status_code for answer in answers)

        assert set(statuses) == {200, 429}
        assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
        texts = {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200}
        assert len(texts) == 1
        assert {answer.status_code for answer in others} == {200}
        assert eventually(lambda: at_rest(server))
