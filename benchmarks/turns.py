"""Engines that answer in turns, so that whatever disturbs the machine meets all of them alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import geometric_mean
from typing import Any

import typer

from benchmarks.engines import Engine, EngineFailed, Round
from benchmarks.slices import Run, run_in_slices
from benchmarks.statistics import Bounds, bounds_of_median, summary


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that are compared."""

    name: str
    engine: Callable[[], Engine]
    """Starts it where it does not run yet. Raises EngineFailed."""
    ask: Callable[[Any], Round]
    """A round of that engine."""
    tokens: int
    """Generated in a round."""
    turns: int | None = None
    """It takes part in so many turns, spread over all; None: in every one."""


@dataclass(slots=True)
class Turns:
    """What was measured: by side, by turn; None where a side sat out."""

    rounds: dict[str, list[Round | None]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """The reason, by side. What it did before it failed is kept."""

    def speeds(self, name: str) -> list[float]:
        """Generated tokens a second."""
        rounds = self.rounds.get(name, [])
        return [self.tokens[name] / each.seconds for each in rounds if each is not None]

    def ratio(
        self,
        name: str,
        other: str,
        of: Callable[[str, Round], float] | None = None,
        turns_each: int = 1,
    ) -> dict[str, Any] | None:
        """`name` over `other`, in the turns in which both took part; None where they never did.

        `of` says what is compared, of a side's name and round; left out, tokens a second.
        `turns_each`: the geometric mean over so many turns, one after the other, is one pair. Two,
        where sides change places and processes from turn to turn, and what one place or process is
        better by would else pass for noise.
        """
        measure = of or (lambda side, each: self.tokens[side] / each.seconds)
        found = [
            measure(name, mine) / measure(other, theirs)
            for mine, theirs in zip(
                self.rounds.get(name, []), self.rounds.get(other, []), strict=False
            )
            if mine is not None and theirs is not None
        ]
        whole = len(found) // turns_each * turns_each
        starts = range(0, whole, turns_each)
        return ratio_of([geometric_mean(found[at : at + turns_each]) for at in starts])


def report(*measured: Turns) -> dict[str, Any]:
    """Tokens a second by side, and who failed."""
    names = dict.fromkeys(name for turns in measured for name in turns.rounds)
    speeds = {name: [each for turns in measured for each in turns.speeds(name)] for name in names}
    return {
        "tokens_per_second": {
            name: summary(mine) | {"rounds": mine} for name, mine in speeds.items() if mine
        },
        "failed": {name: why for turns in measured for name, why in turns.failed.items()},
    }


def ratio_of(pairs: Sequence[float]) -> dict[str, Any] | None:
    """The pairs' median, and between which bounds it lies with 95% confidence on either side."""
    if not pairs:
        return None
    bounds: Bounds | None = bounds_of_median(pairs)
    return summary(pairs) | {
        "pairs": len(pairs),
        "lower_95_bound_of_median": None if bounds is None else bounds.lower,
        "upper_95_bound_of_median": None if bounds is None else bounds.upper,
    }


def take_turns(sides: Sequence[Side], turns: int, crossed: bool = False) -> Turns:
    """`turns` turns in changing order: in each, sides of different engines run in slices, those of
    one engine one after the other. A side that fails sits out from there on.

    Compare no two sides of one engine while others take part: one of them runs in slices with the
    others, and the other one alone at the turn's end, which is faster (by a fifth, for vLLM).

    `crossed`: sides (two or four) take each other's engines, the i-th in turn t that of number
    `i xor t`, and with it the place in the order. Processes of one kind differ by up to 3% in speed
    for as long as they live; any two sides have each other's in as many turns as their own, so that
    what an engine is better by lowers as many ratios as it raises.
    """
    assert not crossed or turns % len(sides) == 0
    result = Turns(
        rounds={side.name: [] for side in sides},
        tokens={side.name: side.tokens for side in sides},
    )
    for turn in range(turns):
        found: dict[str, Round] = {}
        for runs in _together(_taking(sides, turn, turns, crossed), result):
            found |= _measured(runs, result)
        for side in sides:
            round_ = found.get(side.name)
            result.rounds[side.name].append(round_)
            if round_ is not None:
                speed = side.tokens / round_.seconds
                typer.echo(f"  turn {turn + 1:2}/{turns}  {side.name:44} {speed:7.1f} tokens/s")
    return result


def _taking(
    sides: Sequence[Side], turn: int, turns: int, crossed: bool
) -> list[tuple[Side, Callable[[], Engine]]]:
    """Who takes part, in order, on which engine."""
    if crossed:
        shift = turn % len(sides)
        return [(sides[number ^ shift], side.engine) for number, side in enumerate(sides)]
    taking = [(side, side.engine) for side in sides if takes_part(side, turn, turns)]
    return taking[:: -1 if turn % 2 else 1]


def takes_part(side: Side, turn: int, turns: int) -> bool:
    """Its turns lie evenly among all."""
    mine = turns if side.turns is None else side.turns
    return (turn + 1) * mine // turns > turn * mine // turns


def _together(
    taking: Sequence[tuple[Side, Callable[[], Engine]]], result: Turns
) -> list[dict[str, Run]]:
    """What can run in slices, by side: no engine twice."""
    matches: list[dict[str, Run]] = []
    for side, start in taking:
        if side.name in result.failed:
            continue
        try:
            engine = start()
        except EngineFailed as error:
            _note(side.name, error, result)
            continue
        before = [each for each in result.rounds[side.name] if each is not None]
        run = Run(engine, side.ask, before[-1].seconds if before else None)
        for match in matches:
            if all(each.engine is not engine for each in match.values()):
                match[side.name] = run
                break
        else:
            matches.append({side.name: run})
    return matches


def _measured(runs: dict[str, Run], result: Turns) -> dict[str, Round]:
    found = {}
    for name, round_ in run_in_slices(runs).items():
        if isinstance(round_, EngineFailed):
            _note(name, round_, result)
        else:
            found[name] = round_
    return found


def _note(name: str, error: EngineFailed, result: Turns) -> None:
    typer.echo(f"  {name} failed: {error}")
    result.failed[name] = str(error)
