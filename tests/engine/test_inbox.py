"""An idle engine waits a moment for requests that are being made ready; a busy one for nobody."""

import time
from collections.abc import Callable

import pytest

from infuse.server.engine.native import inbox
from tests.engine.harness import Harness

LONG = 60.0


def test_an_idle_engine_waits_for_what_is_being_made_ready(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", LONG)
    engine = start()
    with engine.engine.expecting():
        engine.submit("first", [5, 6])
        time.sleep(0.2)
        assert engine.engine.stats().steps == 0
    engine.submit("second", [7, 8], "default")
    engine.wait()
    engine.assert_idle()


def test_but_only_for_a_moment(start: Callable[..., Harness]) -> None:
    engine = start()
    with engine.engine.expecting():
        assert len(engine.ask([5, 6], max_tokens=3).tokens) == 3
    engine.assert_idle()


def test_it_waits_for_no_more_than_a_step_takes(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", LONG)
    engine = start(max_rows=2, prefill_chunk_tokens=8)
    with engine.engine.expecting():
        assert len(engine.ask([5, 6, 7] * 3, max_tokens=3).tokens) == 3
        engine.submit("first", [5, 6])
        engine.submit("second", [7, 8])
        engine.wait()
    engine.assert_idle()


def test_a_running_batch_waits_for_nobody(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", LONG)
    engine = start()
    engine.submit("runs", [5, 6], max_tokens=200)
    while not engine.answers["runs"].tokens:
        engine.read()
    with engine.engine.expecting():
        engine.submit("joins", [7, 8], max_tokens=3)
        engine.wait("joins")
    engine.engine.cancel("runs")
    engine.wait()
    engine.assert_idle()


def test_a_request_that_cannot_be_made_ready_is_waited_for_no_longer(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", LONG)
    engine = start()
    with pytest.raises(ValueError, match="bad body"), engine.engine.expecting():
        raise ValueError("bad body")
    assert len(engine.ask([5, 6], max_tokens=3).tokens) == 3


def test_requests_wait_no_longer_for_one_that_fails_to_be_made_ready(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", 10 * LONG)
    engine = start()

    def fail() -> None:
        with engine.engine.expecting():
            engine.submit("waits", [5, 6])
            time.sleep(0.2)
            assert engine.engine.stats().steps == 0
            raise ValueError("bad body")

    with pytest.raises(ValueError, match="bad body"):
        fail()
    engine.wait()
    engine.assert_idle()


def test_they_wait_on_where_more_than_one_is_made_ready(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GATHERING_SECONDS", 10 * LONG)
    engine = start()
    with engine.engine.expecting():
        engine.submit("waits", [5, 6])
        with pytest.raises(ValueError, match="bad body"), engine.engine.expecting():
            raise ValueError("bad body")
        time.sleep(0.2)
        assert engine.engine.stats().steps == 0
    engine.submit("comes", [7, 8])
    engine.wait()
    engine.assert_idle()


def test_an_adapter_waits_from_the_moment_that_its_request_is_submitted(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    with engine.held():
        engine.submit("first", [5, 6], "default")
        assert engine.engine.stats().waiting_adapters == {"default"}
    engine.wait()
    engine.assert_idle()
