"""This commit's speed over another one's: with 32 adapters, with the base alone, and over HTTP.

`git worktree add ../before COMMIT`, then `python -m benchmarks.commits ../before`. Both commits'
engines answer the same prompts in turns. Processes of one kind differ by up to 5% in speed for as
long as they live, and the one that was started first is often the slower one: so both are started
several times, and each is the first as often as the other. What two gave in one turn is a pair.
"""

import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.bench import FULL, ROWS, Bench
from benchmarks.engines.infuse_http import EitherWay
from benchmarks.engines.worker import ROOT
from benchmarks.machine import machine
from benchmarks.statistics import summary
from benchmarks.turns import Side, ratio_of, take_turns

RESULTS = Path(__file__).parent / "results" / "commits.json"
MEASURES = ("32 adapters", "base", "HTTP, streaming, 32 adapters")


def main(
    before: Annotated[Path, typer.Argument(help="A checkout of the other commit.")],
    starts: Annotated[int, typer.Option(min=2, help="Of both engines; an even number.")] = 6,
    turns: Annotated[int, typer.Option(min=1, help="With each start.")] = 6,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    pairs: dict[str, list[list[float]]] = {measure: [] for measure in MEASURES}
    with Bench.session(FULL) as bench:
        for start in range(starts):
            typer.echo(f"start {start + 1}/{starts}")
            for measure, found in _turns(bench, before.resolve(), turns, start % 2 == 0).items():
                pairs[measure].append(found)
            bench.keep_only()
    report = {
        "machine": machine(),
        "this_commit": _commit(ROOT),
        "other_commit": _commit(before),
        "ratios": {
            measure: (ratio_of([each for start in found for each in start]) or {})
            | {"by_start": summary([median(start) for start in found])}
            for measure, found in pairs.items()
        },
        "pairs": pairs,
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    for measure, ratio in report["ratios"].items():
        typer.echo(f"{measure}: {ratio['median']:.3f} ({ratio['lower_95_bound_of_median']})")


def _turns(bench: Bench, before: Path, turns: int, is_first: bool) -> dict[str, list[float]]:
    """By measure: this commit's speed over the other's, in each turn. `is_first`: this commit's
    engine is started first."""
    tokens = bench.plan.round_tokens
    asks: dict[str, Any] = {
        MEASURES[0]: lambda each: each.run(bench.requests(bench.names[:ROWS], tokens)),
        MEASURES[1]: lambda each: each.run(bench.requests([None] * ROWS, tokens)),
        MEASURES[2]: lambda each: each.over_http(
            bench.requests(bench.names[:ROWS], tokens), elsewhere=True
        ),
    }

    def now() -> EitherWay:
        return bench.inprocess()

    def then() -> EitherWay:
        return bench.inprocess(tree=before)

    engines = [("now", now), ("before", then)]
    sides = [
        Side(f"{measure}, {name}", engine, ask, ROWS * tokens)
        for measure, ask in asks.items()
        for name, engine in (engines if is_first else reversed(engines))
    ]
    taken = take_turns(sides, turns)
    return {
        measure: [
            mine / theirs
            for mine, theirs in zip(
                taken.speeds(f"{measure}, now"), taken.speeds(f"{measure}, before"), strict=True
            )
        ]
        for measure in MEASURES
    }


def _commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    typer.run(main)
