"""What is taken for a hang, on a virtual clock; and what becomes of an engine that hangs."""

import threading
from collections.abc import Callable, Iterator

import pytest

from infuse.server.engine import EngineDead, FinishReason
from infuse.server.engine.watchdog import Watchdog
from tests.engine.harness import Harness
from tests.factories import run_by_modules, tiny_model


class Watched:
    """A watchdog that looks once a second."""

    def __init__(self, patience: float) -> None:
        self.now = 0.0
        self.dog = Watchdog(patience, lambda: None, lambda: self.now)

    def hangs_within(self, seconds: int) -> bool:
        for _ in range(seconds):
            self.now += 1
            if self.dog.look():
                return True
        return False


def test_work_that_takes_longer_than_it_may_is_a_hang() -> None:
    watched = Watched(patience=10)
    watched.dog.begin()

    assert not watched.hangs_within(10)
    assert watched.hangs_within(3)


def test_work_that_is_known_to_be_long_is_none() -> None:
    watched = Watched(patience=10)
    watched.dog.begin(expected=60)
    assert not watched.hangs_within(600)
    assert watched.hangs_within(3)


def test_a_prompt_that_is_computed_whole_may_take_as_often_as_long_as_it_has_chunks() -> None:
    watched = Watched(patience=10)
    watched.dog.begin(pieces=5)
    assert not watched.hangs_within(50)
    assert watched.hangs_within(3)


def test_each_piece_of_work_begins_anew_and_rest_is_no_hang() -> None:
    watched = Watched(patience=10)
    for _ in range(20):
        watched.dog.begin()
        assert not watched.hangs_within(9)
    watched.dog.rest()

    assert not watched.hangs_within(1000)


def test_time_in_which_the_process_was_stopped_does_not_count() -> None:
    watched = Watched(patience=10)
    watched.dog.begin()
    assert not watched.hangs_within(5)
    watched.now += 3600
    assert not watched.dog.look()

    assert watched.hangs_within(6)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Set to let forwards run. A test ends with it set, so that the model thread ends."""
    gate = threading.Event()
    gate.set()
    yield gate
    gate.set()


def held_by(gate: threading.Event) -> Callable[..., None]:
    def wait(*_: object) -> None:
        gate.wait(60)

    return wait


def test_an_engine_that_hangs_ends_its_requests_once_and_takes_no_more(
    start: Callable[..., Harness], gate: threading.Event
) -> None:
    base = run_by_modules(tiny_model("llama"))
    engine = start(base, {}, hang_timeout=3.0, max_rows=1)
    base.register_forward_pre_hook(held_by(gate))
    assert engine.ask([5]).finish is FinishReason.LENGTH
    gate.clear()
    for name in ("runs", "waits"):
        engine.submit(name, [5, 6], max_tokens=20)
    engine.wait()

    assert {each.finish for each in engine.answers.values()} == {FinishReason.ENGINE_DEAD}
    stats = engine.engine.stats()
    assert (stats.alive, stats.ready, stats.waiting) == (False, False, 0)
    with pytest.raises(EngineDead):
        engine.submit("late", [5])
    gate.set()
    engine.engine.stop(timeout=1)


def test_a_model_thread_that_comes_back_delivers_nothing_and_gives_everything_back(
    start: Callable[..., Harness], gate: threading.Event
) -> None:
    base = run_by_modules(tiny_model("llama"))
    others = set(threading.enumerate())
    engine = start(base, hang_timeout=3.0)
    base.register_forward_pre_hook(held_by(gate))
    gate.clear()
    engine.submit("runs", [5, 6], "default", max_tokens=20)
    engine.wait()
    assert engine.registry.stats().leases == 1, "its step may still read the adapter"
    gate.set()
    [thread] = [each for each in {*threading.enumerate()} - others if each.name == "model"]
    thread.join(30)

    assert engine.registry.stats().leases == 0
    engine.assert_nothing_held()
