"""Rounds in slices: engines run one at a time, and only while they run does their time count."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks.engines import Answer, EngineFailed, Round
from benchmarks.slices import Run, retimed, run_in_slices

_COUNTING = """
import sys, time
for line in sys.stdin:
    began, until = time.perf_counter(), time.process_time() + float(line)
    while time.process_time() < until:
        pass
    print(began, time.perf_counter() - began, flush=True)
"""


class Counting:
    """An engine that computes for some seconds of its processor's time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.process = subprocess.Popen(
            [sys.executable, "-c", _COUNTING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def group(self) -> int:
        return self.process.pid

    def ask(self, _: object = None) -> Round:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(self.seconds, file=self.process.stdin, flush=True)
        except OSError as error:
            raise EngineFailed("it ended") from error
        answer = self.process.stdout.readline()
        return Round(*map(float, answer.split()))


@pytest.fixture
def engines() -> Iterator[list[Counting]]:
    found = [Counting(0.3), Counting(0.6)]
    for each in found:
        each.ask()
    yield found
    for each in found:
        each.process.kill()
        each.process.communicate()


def runs(engines: list[Counting]) -> dict[str, Run]:
    return {str(number): Run(each, each.ask, each.seconds) for number, each in enumerate(engines)}


def test_rounds_share_the_time_and_their_seconds_never_overlap(engines: list[Counting]) -> None:
    began = time.perf_counter()
    found = run_in_slices(runs(engines))
    took = time.perf_counter() - began
    seconds = []
    for name, engine in zip(found, engines, strict=True):
        round_ = found[name]
        assert isinstance(round_, Round)
        assert round_.seconds >= 0.9 * engine.seconds
        seconds.append(round_.seconds)
    assert sum(seconds) <= took


def test_engines_go_on_afterwards(engines: list[Counting]) -> None:
    run_in_slices(runs(engines))
    assert all(each.ask().seconds > 0 for each in engines)


def test_an_engine_that_ends_fails_alone(engines: list[Counting]) -> None:
    engines[0].process.kill()
    engines[0].process.wait()
    first, second = run_in_slices(runs(engines)).values()
    assert isinstance(first, EngineFailed)
    assert isinstance(second, Round)


def test_time_counts_while_the_engine_runs() -> None:
    answer = Answer("", arrived=0.0, first=1.5, last=4.0)
    found = retimed(Round(10.0, 5.0, [answer]), [(9.0, 11.0), (12.0, 13.0), (14.5, 20.0)])
    assert found == Round(10.0, 2.5, [Answer("", arrived=0.0, first=1.0, last=2.0)])
