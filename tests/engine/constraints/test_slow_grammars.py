"""Grammars that take seconds to compile, beside a model that is in use."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from infuse.server.engine.constraints import vetting, vetting_process
from infuse.server.engine.constraints.grammars import Grammar, Grammars, Refusal
from tests.api.test_streaming import eventually
from tests.factories import TOKENS, tiny_tokenizer

SLOW = json.dumps({"type": "integer", "multipleOf": 9_999_901})
"""It takes minutes: it is refused after `vetting.CPU_SECONDS`."""
SIMPLE = json.dumps({"type": "integer"})


def grammars(is_busy: Callable[[], bool]) -> Grammars:
    return Grammars(tiny_tokenizer(), TOKENS, frozenset({2}), is_busy)


def vetting_processes() -> list[tuple[str, int]]:
    """The state and the niceness of each process of ours that vets a grammar."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_text()
            state, parent, *more = (folder / "stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(parent) == os.getpid() and vetting.__file__ in command:
            found.append((state, int(more[14])))
    return found


async def vetting_is(wanted: tuple[str, int]) -> bool:
    for _ in range(6000):
        if vetting_processes() == [wanted]:
            return True
        await asyncio.sleep(0.01)
    return False


def test_a_slow_grammar_rests_while_the_model_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting_process, "REST", 10**6)

    async def vet() -> bool:
        making = asyncio.create_task(grammars(lambda: True).make("", "", "json", SLOW))
        rests = await vetting_is(("T", 10))
        making.cancel()
        await asyncio.wait([making])
        return rests

    assert asyncio.run(vet()), "T: it is stopped"
    assert eventually(lambda: not vetting_processes()), "a process that rests ends with its request"


def test_a_slow_grammar_that_rests_between_is_refused_like_any_other() -> None:
    refused = asyncio.run(grammars(lambda: True).make("", "", "json", SLOW))

    assert isinstance(refused, Refusal)
    assert refused.problem.endswith("to compile")


def test_a_slow_grammar_does_not_rest_while_the_model_is_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vetting_process, "REST", 10**6)

    refused = asyncio.run(grammars(lambda: False).make("", "", "json", SLOW))
    assert isinstance(refused, Refusal)


def test_simple_grammars_do_not_wait_for_slow_ones_of_their_tenant_or_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vetting_process, "REST", 10**6)

    async def made() -> list[Grammar | Refusal]:
        served = grammars(lambda: True)
        slow = [
            asyncio.create_task(served.make(tenant, "", "json", SLOW.replace("01}", f"{n:02}}}")))
            for tenant in "abc"
            for n in range(1, 4)
        ]
        rests = await vetting_is(("T", 10))
        simple = [await served.make(tenant, "", "json", SIMPLE) for tenant in "ad"]
        assert rests
        assert not any(each.done() for each in slow)
        for each in slow:
            each.cancel()
        await asyncio.wait(slow)
        return simple

    assert all(isinstance(each, Grammar) for each in asyncio.run(made()))


def test_a_grammar_that_is_slow_and_right_is_compiled() -> None:
    """500 formats take a few tenths of a second."""
    kinds = ["date-time", "email", "uuid", "uri", "ipv6"]
    fields = {f"p{n}": {"type": "string", "format": kinds[n % 5]} for n in range(500)}
    schema = json.dumps({"type": "object", "properties": fields, "required": list(fields)})
    made = asyncio.run(grammars(lambda: True).make("", "", "json", schema))

    assert isinstance(made, Grammar)
