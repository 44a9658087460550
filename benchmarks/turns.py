"""Engines that answer in turns, so that whatever disturbs the machine meets all of them alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import typer

from benchmarks.engines import EngineFailed, Round
from benchmarks.statistics import Bounds, bounds_of_median, summary

_AT_REST_PERCENT = 10.0
"""Of all cores."""
_SETTLING_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that are compared."""

    name: str
    run: Callable[[], Round]
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
        return [self.tokens[name] / each.seconds for each in self.rounds[name] if each is not None]

    def ratio(
        self, name: str, other: str, of: Callable[[str, Round], float] | None = None
    ) -> dict[str, Any] | None:
        """`name` over `other`, in the turns in which both took part; None where they never did.

        `of` says what is compared, of a side's name and round; left out, tokens a second.
        """
        measure = of or (lambda side, each: self.tokens[side] / each.seconds)
        pairs = [
            measure(name, mine) / measure(other, theirs)
            for mine, theirs in zip(
                self.rounds.get(name, []), self.rounds.get(other, []), strict=False
            )
            if mine is not None and theirs is not None
        ]
        return ratio_of(pairs)

    def report(self) -> dict[str, Any]:
        """Tokens a second by side, and who failed."""
        return {
            "tokens_per_second": {
                name: summary(self.speeds(name)) | {"rounds": self.speeds(name)}
                for name in self.rounds
                if self.speeds(name)
            },
            "failed": self.failed,
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


def take_turns(sides: Sequence[Side], turns: int) -> Turns:
    """`turns` turns in changing order. A side that fails sits out from there on."""
    result = Turns(
        rounds={side.name: [] for side in sides}, tokens={side.name: side.tokens for side in sides}
    )
    for turn in range(turns):
        for side in sides if turn % 2 == 0 else reversed(sides):
            round_ = _attempt(side, result) if takes_part(side, turn, turns) else None
            result.rounds[side.name].append(round_)
            if round_ is not None:
                speed = side.tokens / round_.seconds
                typer.echo(f"  turn {turn + 1:2}/{turns}  {side.name:44} {speed:7.1f} tokens/s")
    return result


def takes_part(side: Side, turn: int, turns: int) -> bool:
    """Its turns lie evenly among all."""
    mine = turns if side.turns is None else side.turns
    return (turn + 1) * mine // turns > turn * mine // turns


def _attempt(side: Side, result: Turns) -> Round | None:
    if side.name in result.failed:
        return None
    _settle()
    try:
        return side.run()
    except EngineFailed as error:
        typer.echo(f"  {side.name} failed: {error}")
        result.failed[side.name] = str(error)
        return None


def _settle() -> None:
    """Wait until the engine whose turn it was is at rest: vLLM's workers poll for seconds more."""
    late = time.perf_counter() + _SETTLING_SECONDS
    while psutil.cpu_percent(interval=0.1) > _AT_REST_PERCENT and time.perf_counter() < late:
        pass
