"""Engines in turns: whose turn it is, what becomes of one that fails, and what is a pair."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest

from benchmarks import turns as module
from benchmarks.engines import Engine, EngineFailed, Request, Round
from benchmarks.slices import Run
from benchmarks.turns import Side, Turns, report, take_turns


class Idle:
    """An engine that only has a name."""

    group = 0

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self) -> None: ...

    def run(self, requests: Sequence[Request], in_flight: int | None = None) -> Round:
        raise NotImplementedError

    def stop(self) -> None: ...


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What ran in slices with what; rounds of these engines come one after the other."""
    matches: list[list[str]] = []

    def run_one_after_the_other(runs: dict[str, Run]) -> dict[str, Round | EngineFailed]:
        matches.append([*runs])
        found: dict[str, Round | EngineFailed] = {}
        for name, run in runs.items():
            try:
                found[name] = run.ask(run.engine)
            except EngineFailed as error:
                found[name] = error
        return found

    monkeypatch.setattr(module, "run_in_slices", run_one_after_the_other)
    return matches


def side(
    name: str,
    log: list[str] | None = None,
    turns: int | None = None,
    engine: Engine | None = None,
    seconds: Callable[[Engine], float] = lambda _: 1.0,
) -> Side:
    running = engine or Idle(name)

    def ask(asked: Engine) -> Round:
        if log is not None:
            log.append(name)
        return Round(0.0, seconds(asked))

    return Side(name, lambda: running, ask, tokens=10, turns=turns)


def test_sides_alternate_in_changing_order() -> None:
    log: list[str] = []
    take_turns([side("a", log), side("b", log)], turns=3)
    assert "".join(log) == "ab" + "ba" + "ab"


def test_engines_run_in_slices_and_rounds_of_one_engine_one_after_the_other(
    together: list[list[str]],
) -> None:
    engine = Idle("shared")
    take_turns([side("a", engine=engine), side("b"), side("c", engine=engine)], turns=1)
    assert together == [["a", "b"], ["c"]]


def test_a_slow_side_takes_part_in_some_turns_spread_over_all() -> None:
    found = take_turns([side("a"), side("slow", turns=3)], turns=9)
    took_part = [each is not None for each in found.rounds["slow"]]
    assert took_part == [False, False, True] * 3
    assert all(found.rounds["a"])


def rounds(*seconds: float | None) -> list[Round | None]:
    return [None if each is None else Round(0.0, each) for each in seconds]


def test_a_ratio_pairs_what_was_measured_in_one_turn() -> None:
    found = Turns(
        rounds={"a": rounds(1.0, None, 4.0), "b": rounds(2.0, 9.0, 4.0)},
        tokens={"a": 10, "b": 10},
    )
    ratio = found.ratio("a", "b")
    assert ratio is not None
    assert ratio["pairs"] == 2
    assert ratio["median"] == pytest.approx((2.0 + 1.0) / 2)
    assert ratio["lower_95_bound_of_median"] is None


def test_a_pair_of_two_turns_is_free_of_what_the_first_place_is_faster_by() -> None:
    found = Turns(
        rounds={"a": rounds(1.1, 1.0, 1.1, 1.0, 1.1), "b": rounds(1.0, 1.1, 1.0, 1.1, 1.0)},
        tokens={"a": 10, "b": 10},
    )
    ratio = found.ratio("a", "b", turns_each=2)
    assert ratio is not None
    assert ratio["pairs"] == 2
    assert ratio["least"] == ratio["greatest"] == pytest.approx(1.0)


def test_any_two_sides_that_cross_over_have_each_others_engine_as_often_as_their_own() -> None:
    """Each engine takes 3% longer than the one before it, each side 10%."""
    slower = {"w": 1.0, "x": 1.03, "y": 1.03**2, "z": 1.03**3}

    def took(own: float) -> Callable[[Engine], float]:
        return lambda engine: own * slower[engine.name]

    for count in (2, 4):
        sides = [
            side(name, engine=Idle(engine), seconds=took(1.1**number))
            for number, (name, engine) in enumerate(zip("abcd"[:count], slower, strict=False))
        ]
        found = take_turns(sides, turns=8, crossed=True)
        for first, second in combinations(range(count), 2):
            names = "abcd"[first], "abcd"[second]
            ratio = found.ratio(*names)
            assert ratio is not None
            assert ratio["pairs"] == 8
            logs = [math.log(b / a) for a, b in zip(*map(found.speeds, names), strict=True)]
            assert -sum(logs) / 8 == pytest.approx((second - first) * math.log(1.1))


def test_a_side_that_fails_sits_out_and_the_others_go_on() -> None:
    log: list[str] = []

    def fail(_: Engine) -> Round:
        log.append("x")
        if log.count("x") > 1:
            raise EngineFailed("out of memory")
        return Round(0.0, 1.0)

    found = take_turns([side("a", log), Side("x", lambda: Idle("x"), fail, tokens=10)], turns=5)
    assert found.failed == {"x": "out of memory"}
    assert [each is not None for each in found.rounds["x"]] == [True, False, False, False, False]
    assert len(found.speeds("a")) == 5
    assert log.count("x") == 2


def test_a_side_whose_engine_never_starts_leaves_no_ratio() -> None:
    def start() -> Engine:
        raise EngineFailed("no such package")

    never = Side("x", start, lambda engine: engine.run([]), tokens=10)
    found = take_turns([side("a"), never], turns=2)
    assert found.ratio("a", "x") is None
    assert "x" not in report(found)["tokens_per_second"]
    assert report(found)["failed"] == {"x": "no such package"}


def test_a_report_of_several_comparisons_has_each_side_once() -> None:
    found = [take_turns([side("base"), side(name)], turns=2) for name in ("a", "b")]
    speeds = report(*found)["tokens_per_second"]
    assert {name: len(each["rounds"]) for name, each in speeds.items()} == {
        "base": 4,
        "a": 2,
        "b": 2,
    }
