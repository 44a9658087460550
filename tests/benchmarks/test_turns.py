"""Engines in turns: whose turn it is, what becomes of one that fails, and what is a pair."""

import pytest

from benchmarks import turns as module
from benchmarks.engines import EngineFailed, Round
from benchmarks.turns import Side, Turns, take_turns


@pytest.fixture(autouse=True)
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """These engines leave the machine at rest; other tests may not."""
    monkeypatch.setattr(module, "_settle", lambda: None)


def side(name: str, log: list[str], seconds: float = 1.0, turns: int | None = None) -> Side:
    def run() -> Round:
        log.append(name)
        return Round(seconds)

    return Side(name, run, tokens=10, turns=turns)


def test_sides_alternate_in_changing_order() -> None:
    log: list[str] = []
    take_turns([side("a", log), side("b", log)], turns=3)
    assert "".join(log) == "ab" + "ba" + "ab"


def test_a_slow_side_takes_part_in_some_turns_spread_over_all() -> None:
    log: list[str] = []
    found = take_turns([side("a", log), side("slow", log, turns=3)], turns=9)
    took_part = [each is not None for each in found.rounds["slow"]]
    assert took_part == [False, False, True] * 3
    assert all(found.rounds["a"])


def test_a_ratio_pairs_what_was_measured_in_one_turn() -> None:
    found = Turns(
        rounds={"a": [Round(1.0), None, Round(4.0)], "b": [Round(2.0), Round(9.0), Round(4.0)]},
        tokens={"a": 10, "b": 10},
    )
    ratio = found.ratio("a", "b")
    assert ratio is not None
    assert ratio["pairs"] == 2
    assert ratio["median"] == pytest.approx((2.0 + 1.0) / 2)
    assert ratio["lower_95_bound_of_median"] is None


def test_a_side_that_fails_sits_out_and_the_others_go_on() -> None:
    log: list[str] = []

    def fail() -> Round:
        log.append("x")
        if log.count("x") > 1:
            raise EngineFailed("out of memory")
        return Round(1.0)

    found = take_turns([side("a", log), Side("x", fail, tokens=10)], turns=5)
    assert found.failed == {"x": "out of memory"}
    assert [each is not None for each in found.rounds["x"]] == [True, False, False, False, False]
    assert len(found.speeds("a")) == 5
    assert log.count("x") == 2


def test_a_side_that_never_starts_leaves_no_ratio() -> None:
    def fail() -> Round:
        raise EngineFailed("no such package")

    found = take_turns([side("a", []), Side("x", fail, tokens=10)], turns=2)
    assert found.ratio("a", "x") is None
    assert "x" not in found.report()["tokens_per_second"]
