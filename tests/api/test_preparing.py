"""Requests are prepared on threads, a few at once."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from unittest.mock import Mock

import httpx
import pytest

from tests.api.test_health import StartServer
from tests.api.test_streaming import COMPLETIONS, eventually

AT_ONCE = 4
"""Requests of one key that are prepared at once."""


def test_the_engine_expects_no_request_that_waits_for_its_turn(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services = start_server()
    gate, expected = threading.Event(), 0
    expecting = services.engine.expecting

    @contextmanager
    def counted() -> Iterator[None]:
        nonlocal expected
        with expecting():
            expected += 1
            yield

    monkeypatch.setattr(services.engine, "expecting", counted)
    turns = Mock(side_effect=services.preparing.turn)
    monkeypatch.setattr(services.preparing, "turn", turns)
    hanging = Mock(side_effect=lambda *_: gate.wait(60) and [(5,)])
    monkeypatch.setattr("infuse.server.api.completions.encode_prompts", hanging)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}

    with ThreadPoolExecutor(AT_ONCE + 1) as clients:
        answers = [
            clients.submit(httpx.post, url + COMPLETIONS, json=body, timeout=60)
            for _ in range(AT_ONCE + 1)
        ]
        waits = eventually(lambda: turns.call_count == AT_ONCE + 1)
        before = expected
        gate.set()

    assert waits
    assert before == AT_ONCE
    assert expected == AT_ONCE + 1
    assert [answer.result().status_code for answer in answers] == [200] * (AT_ONCE + 1)
