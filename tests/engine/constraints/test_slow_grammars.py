"""Grammars that take seconds to compile, beside a model that is in use."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable

import psutil
import pytest

from infuse.server.engine.constraints import vetting, vetting_process
from infuse.server.engine.constraints.grammars import Grammar, Grammars, Refusal
from tests.api.test_streaming import eventually
from tests.engine.constraints.processes import forks_of, vetting_processes
from tests.factories import TOKENS, tiny_tokenizer

SLOW = json.dumps({"type": "integer", "multipleOf": 9_999_901})
"""It takes minutes: it is refused after `vetting.CPU_SECONDS`."""
RESTS = (psutil.STATUS_STOPPED, vetting.NICENESS)
SIMPLE = json.dumps({"type": "integer"})


VETS_SLOWLY = f"""
import asyncio
from infuse.server.engine.constraints.vetting_process import Vetting
asyncio.run(Vetting().vet_slowly("json", {SLOW!r}, lambda: True))
"""


def grammars(is_busy: Callable[[], bool]) -> Grammars:
    return Grammars(tiny_tokenizer(), TOKENS, frozenset({2}), is_busy)


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
        rests = await vetting_is(RESTS)
        making.cancel()
        await asyncio.wait([making])
        return rests

    assert asyncio.run(vet())
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
        rests = await vetting_is(RESTS)
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


def test_when_the_process_that_others_are_forked_from_has_ended_another_starts() -> None:
    served, others = grammars(lambda: False), forks_of(psutil.Process())
    asyncio.run(served.make("", "", "json", SIMPLE))
    [forks] = set(forks_of(psutil.Process())).difference(others)
    forks.kill()
    assert eventually(lambda: forks.status() == psutil.STATUS_ZOMBIE)
    made = asyncio.run(served.make("", "", "json", json.dumps({"type": "boolean"})))

    assert isinstance(made, Grammar)
    assert forks not in forks_of(psutil.Process())


def test_the_processes_end_with_the_server_also_while_one_rests() -> None:
    server = subprocess.Popen([sys.executable, "-c", VETS_SLOWLY])
    seen = psutil.Process(server.pid)
    try:
        assert eventually(lambda: vetting_processes(seen) == [RESTS], 60)
        [forks] = forks_of(seen)
        processes = [forks, *forks.children()]
    finally:
        server.kill()
        server.wait()

    _, left = psutil.wait_procs(processes, timeout=30)
    assert not left
