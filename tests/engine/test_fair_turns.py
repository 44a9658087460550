"""Turns at work that takes processors: bounded, and fair among tenants."""

import asyncio
from collections import Counter

import pytest

from infuse.server.engine import QueueFull
from infuse.server.engine.fair_turns import FairTurns


class Work:
    """Turns that end when they are let go, in the order in which they began."""

    def __init__(self, turns: FairTurns) -> None:
        self._turns = turns
        self.order: list[str] = []
        self.working: Counter[str] = Counter()
        self._ends: list[asyncio.Event] = []

    def ask(self, tenant: str) -> "asyncio.Task[None]":
        return asyncio.create_task(self._work(tenant))

    async def _work(self, tenant: str) -> None:
        async with self._turns.turn(tenant):
            self.order.append(tenant)
            self.working[tenant] += 1
            self._ends.append(asyncio.Event())
            await self._ends[-1].wait()
            self.working[tenant] -= 1

    async def settle(self) -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def end_next(self) -> None:
        self._ends.pop(0).set()

    async def end_one(self) -> None:
        self.end_next()
        await self.settle()


def test_tenants_are_served_in_turns_however_many_of_one_wait() -> None:
    async def run() -> list[str]:
        work = Work(FairTurns(1, each=1))
        tasks = [work.ask("a") for _ in range(6)]
        await work.settle()
        tasks += [work.ask(tenant) for tenant in "bbc"]
        await work.settle()
        for _ in tasks:
            await work.end_one()
        await asyncio.gather(*tasks)
        return work.order

    assert asyncio.run(run()) == list("aabcabaaa")


def test_a_tenant_alone_leaves_room_for_another() -> None:
    async def run() -> None:
        work = Work(FairTurns(3, each=2))
        tasks = [work.ask("a") for _ in range(5)]
        await work.settle()
        assert work.working == {"a": 2}
        tasks.append(work.ask("b"))
        await work.settle()
        assert work.working == {"a": 2, "b": 1}
        for _ in tasks:
            await work.end_one()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_who_leaves_takes_no_turn_and_gives_back_its_own() -> None:
    async def run() -> None:
        work = Work(FairTurns(1, each=1))
        first, second, third = (work.ask(tenant) for tenant in "abc")
        await work.settle()
        second.cancel()
        await work.settle()
        first.cancel()
        await work.settle()
        assert work.order == ["a", "c"]
        third.cancel()
        await work.settle()
        last = work.ask("d")
        await work.settle()
        assert work.order == ["a", "c", "d"]
        last.cancel()

    asyncio.run(run())


def test_too_many_of_one_tenant_are_refused_and_another_waits() -> None:
    async def run() -> None:
        turns = FairTurns(1, each=1, waiting=2)
        work = Work(turns)
        tasks = [work.ask("a") for _ in range(3)]
        await work.settle()
        with pytest.raises(QueueFull) as refused:
            await work.ask("a")
        assert refused.value.retry_after >= 1
        tasks.append(work.ask("b"))
        for _ in tasks:
            await work.settle()
            await work.end_one()
        await asyncio.gather(*tasks)
        assert work.order == list("aaba")

    asyncio.run(run())


def test_a_turn_passes_over_who_was_cancelled_in_the_same_moment() -> None:
    async def check() -> None:
        work = Work(FairTurns(at_once=1, each=1))
        work.ask("a")
        await work.settle()
        leaving, staying = work.ask("b"), work.ask("b")
        await work.settle()
        work.end_next()
        leaving.cancel()
        await work.settle()
        assert work.order == ["a", "b"]
        await work.end_one()
        assert staying.done()

    asyncio.run(check())
