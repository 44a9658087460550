"""Several engines' rounds at once, in slices: at any moment all engines but one are stopped.

What disturbs a shared machine lasts for a second or a few: rounds one after the other meet other
weather, and the shorter the slices, the more alike it is for all.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from benchmarks.engines import Answer, Engine, EngineFailed, Round

SLICE_SECONDS = 0.1
"""Of the fastest: about a step of 32 rows."""
_FIRST_SLICE_SECONDS = 0.25
"""Longer than a server waits for requests that come together."""
_SENDING_SECONDS = 0.2
"""In which clients send, before any engine goes on: four of them take 0.04 and more."""

Slice = tuple[float, float]
"""From when until when an engine ran, by `time.perf_counter`."""


@dataclass(frozen=True, slots=True)
class Run:
    engine: Engine
    ask: Callable[[Engine], Round]
    seconds: float | None
    """What the round takes, about; None: not known yet. In that proportion are the slices, so that
    all rounds end together."""


def run_in_slices(runs: Mapping[str, Run]) -> dict[str, Round | EngineFailed]:
    """A round of each, by name. Seconds are those in which the engine ran; the engines differ."""
    shares = _shares(runs)
    slices: dict[str, list[Slice]] = {name: [] for name in runs}
    with (
        ThreadPoolExecutor(len(runs)) as clients,
        _stopped([each.engine for each in runs.values()]),
    ):
        rounds = {name: clients.submit(each.ask, each.engine) for name, each in runs.items()}
        time.sleep(_SENDING_SECONDS)
        seconds = _FIRST_SLICE_SECONDS
        while left := [name for name in runs if not rounds[name].done()]:
            for name in left:
                length = None if len(left) == 1 else seconds * shares[name]
                slices[name].append(_slice(runs[name].engine, rounds[name], length))
            seconds = SLICE_SECONDS
    return {name: _found(rounds[name], slices[name]) for name in runs}


def retimed(round_: Round, slices: Sequence[Slice]) -> Round:
    """All its times without those in which the engine was stopped."""

    def running(seconds: float) -> float:
        until = round_.began + seconds
        return sum(max(0.0, min(until, end) - max(round_.began, start)) for start, end in slices)

    def answer(each: Answer) -> Answer:
        first = None if each.first is None else running(each.first)
        return replace(each, arrived=running(each.arrived), first=first, last=running(each.last))

    return replace(
        round_,
        seconds=running(round_.seconds),
        answers=[answer(each) for each in round_.answers],
    )


def _shares(runs: Mapping[str, Run]) -> dict[str, float]:
    """How much longer its slices are than the fastest engine's."""
    known = [each.seconds for each in runs.values() if each.seconds is not None]
    return {
        name: 1.0 if len(known) < len(runs) or each.seconds is None else each.seconds / min(known)
        for name, each in runs.items()
    }


@contextmanager
def _stopped(engines: Sequence[Engine]) -> Iterator[None]:
    for each in engines:
        _signal(each, signal.SIGSTOP)
    try:
        yield
    finally:
        for each in engines:
            _signal(each, signal.SIGCONT)


def _slice(engine: Engine, round_: Future[Round], length: float | None) -> Slice:
    """Let it run for so long, or until its round ends."""
    start = time.perf_counter()
    _signal(engine, signal.SIGCONT)
    wait([round_], length)
    _signal(engine, signal.SIGSTOP)
    return start, time.perf_counter()


def _signal(engine: Engine, what: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # Its round says that it has ended.
        os.killpg(engine.group, what)


def _found(round_: Future[Round], slices: Sequence[Slice]) -> Round | EngineFailed:
    try:
        return retimed(round_.result(), slices)
    except EngineFailed as error:
        return error
