"""A key's slow constraints delay no other key, and no constraint that is compiled already."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.engine.constraints import grammars as constraints
from infuse.server.engine.constraints.vetting import NICENESS
from infuse.server.services import Services
from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.api.test_auth import bearer, keys_file
from tests.api.test_health import StartServer
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.engine.constraints.processes import vetting_processes

Body = dict[str, Any]
SLOW = [{"type": "integer", "multipleOf": 9_999_900 + number} for number in range(1, 60, 2)]


def body(**structured_outputs: Any) -> Body:
    return {
        "model": "tiny",
        "prompt": "A",
        "max_tokens": 8,
        "structured_outputs": structured_outputs,
    }


@pytest.fixture(scope="module")
def guarded(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Services]]:
    folder = tmp_path_factory.mktemp("constraints")
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=folder / "store",
        keys_file=keys_file(folder / "keys.json"),
    )
    with run_server(settings) as running:
        yield running


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.StreamWriter]:
    """The connections to the processes that try grammars, in the order of their starts."""
    begun: list[asyncio.StreamWriter] = []
    begin = asyncio.open_unix_connection

    async def noting(**options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await begin(**options)
        begun.append(writer)
        return reader, writer

    monkeypatch.setattr(asyncio, "open_unix_connection", noting)
    return begun


def client_of(guarded: tuple[str, Services], key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=guarded[0], headers=bearer(key), timeout=100)


@asynccontextmanager
async def both(guarded: tuple[str, Services]) -> AsyncIterator[tuple[httpx.AsyncClient, ...]]:
    async with client_of(guarded, "everything") as one, client_of(guarded, "generate") as other:
        yield one, other


def test_a_keys_slow_constraints_hold_up_neither_another_key_nor_what_is_compiled(
    guarded: tuple[str, Services], tried: list[asyncio.StreamWriter]
) -> None:
    async def run() -> None:
        async with (
            client_of(guarded, "everything") as slow,
            client_of(guarded, "generate") as quick,
        ):
            known = await slow.post(COMPLETIONS, json=body(regex="known"))
            flood = [
                asyncio.create_task(slow.post(COMPLETIONS, json=body(json=schema)))
                for schema in SLOW[:24]
            ]
            while len(tried) < 2:
                await asyncio.sleep(0.01)
            again = await slow.post(COMPLETIONS, json=body(regex="known"))
            free = await slow.post(COMPLETIONS, json={"model": "tiny", "prompt": "A"})
            other = await quick.post(COMPLETIONS, json=body(regex="o(th)er"))
            ended = sum(task.done() for task in flood)
            for task in flood:
                task.cancel()
        answers = [known, again, free, other]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert other.json()["choices"][0]["text"] == "other"
        assert ended <= 12, "the flood was not over"

    asyncio.run(run())
    assert eventually(lambda: all(each.is_closing() for each in tried) and not vetting_processes())
    asked, headers = body(regex="afterwards"), bearer("everything")
    after = httpx.post(guarded[0] + COMPLETIONS, json=asked, headers=headers, timeout=100)
    assert after.status_code == 200
    # The first two, the other key's, the last one, and those whose turn came meanwhile.
    assert len(tried) <= 16, "the flood is no longer compiled"


def test_what_a_client_left_behind_stops(
    guarded: tuple[str, Services], tried: list[asyncio.StreamWriter]
) -> None:
    async def ask(count: int) -> None:
        async with client_of(guarded, "everything") as client:
            asked = asyncio.create_task(client.post(COMPLETIONS, json=body(json=SLOW[25])))
            while len(tried) < count:
                await asyncio.sleep(0.01)
            asked.cancel()

    # The second begins anew: nothing of the first is left.
    for count in (1, 2):
        asyncio.run(ask(count))
        assert eventually(lambda: not vetting_processes())


def test_a_constraint_that_takes_long_gives_way_to_the_model(
    guarded: tuple[str, Services],
) -> None:
    async def run() -> None:
        async with client_of(guarded, "everything") as client:
            asked = asyncio.create_task(client.post(COMPLETIONS, json=body(json=SLOW[27])))
            while NICENESS not in [niceness for _, niceness in vetting_processes()]:
                await asyncio.sleep(0.01)
            asked.cancel()

    asyncio.run(run())


def test_one_constraint_of_many_requests_is_compiled_once_and_its_refusal_remembered(
    guarded: tuple[str, Services], tried: list[asyncio.StreamWriter]
) -> None:
    async def run() -> list[httpx.Response]:
        async with client_of(guarded, "everything") as client:
            asked = [client.post(COMPLETIONS, json=body(json=SLOW[26])) for _ in range(6)]
            asked += [client.post(COMPLETIONS, json=body(regex="ab{2}")) for _ in range(6)]
            answers = await asyncio.gather(*asked)
            return [*answers, await client.post(COMPLETIONS, json=body(json=SLOW[26]))]

    *many, last = asyncio.run(run())

    assert [answer.status_code for answer in many] == [400] * 6 + [200] * 6
    assert last.json() == many[0].json()
    assert "to compile" in last.json()["error"]["message"]
    assert len(tried) == 3, "the slow one is begun again with slow ones"


def test_a_key_cannot_tell_what_another_has_compiled(
    guarded: tuple[str, Services], tried: list[asyncio.StreamWriter]
) -> None:
    for key in ("everything", "generate", "generate"):
        asked = body(choice=["the secret word", "another"])
        answer = httpx.post(guarded[0] + COMPLETIONS, json=asked, headers=bearer(key), timeout=100)
        assert answer.status_code == 200

    assert len(tried) == 2


def test_too_many_constraints_of_one_key_are_refused_with_a_time_to_come_back(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert constraints.MAX_WAITING >= 24
    monkeypatch.setattr(constraints, "MAX_WAITING", 3)
    guarded = start_server(keys_file=keys_file(tmp_path / "keys.json"))

    async def run() -> tuple[httpx.Response, httpx.Response]:
        async with (
            client_of(guarded, "everything") as slow,
            client_of(guarded, "generate") as quick,
        ):
            flood = [
                asyncio.create_task(slow.post(COMPLETIONS, json=body(json=schema)))
                for schema in SLOW[:6]
            ]
            done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            other = await quick.post(COMPLETIONS, json=body(regex="never mind"))
            for task in flood:
                task.cancel()
            return done.pop().result(), other

    refused, other = asyncio.run(run())

    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json()["error"]["code"] == "queue_full"
    assert other.status_code == 200
