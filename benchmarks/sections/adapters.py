"""What adapters cost beside the base, by their popularity, and against PEFT.

Over HTTP, streaming, on one server that has all adapters registered.
"""

import math
from collections.abc import Callable
from itertools import count
from statistics import fmean
from typing import Any

from benchmarks.bench import ROWS, Bench
from benchmarks.engines import Engine, Request, Round
from benchmarks.turns import Side, take_turns
from benchmarks.workload import Popularity, choose

PEFT_REQUESTS = 4
"""Of the 32, others in each turn: one after the other, the rest would take as long each."""
MANY_EXPONENT = 1.0
"""Flatter than Punica's: most of 32 rows then use an adapter each, and many of them a cold one."""

BASE = "base"
IDENTICAL = "1 adapter (identical)"
UNIFORM = "6 adapters (uniform)"
SKEWED = "Zipf over 32 adapters"
DISTINCT = "32 adapters (distinct)"
MANY = "Zipf over all registered"
BY_SKEW = (IDENTICAL, UNIFORM, SKEWED, DISTINCT, MANY)
BESIDE = "16 base rows beside 16 adapters"
PEFT = "PEFT, one adapter after the other"
_SKEWS: dict[str, Popularity] = {IDENTICAL: "identical", UNIFORM: "uniform", SKEWED: "zipf"}


def measure(bench: Bench) -> dict[str, Any]:
    plan, server = bench.plan, bench.server()
    few = bench.names[:ROWS]
    tokens = ROWS * plan.round_tokens
    half = [name if row % 2 else None for row, name in enumerate(few)]

    def side(name: str, adapters: list[str | None], turns: int | None = None) -> Side:
        return Side(
            name, lambda: server.run(bench.requests(adapters, plan.round_tokens)), tokens, turns
        )

    sides = [
        side(DISTINCT, [*few]),
        side(BASE, [None] * ROWS),
        side(BESIDE, half),
        Side(MANY, draws(bench, server), tokens, plan.many_turns),
        *(
            side(name, [*choose(popularity, few, ROWS)], math.ceil(plan.peer_turns / 2))
            for name, popularity in _SKEWS.items()
        ),
        Side(PEFT, some(bench, bench.peft), PEFT_REQUESTS * plan.round_tokens, plan.peer_turns),
    ]
    turns = take_turns(sides, plan.pairs)
    return turns.report() | {
        "ratios": {
            "adapters_over_base": turns.ratio(DISTINCT, BASE),
            "many_over_base": turns.ratio(MANY, BASE),
            "base_beside_adapters_over_alone": turns.ratio(BESIDE, BASE, of_base_rows),
            "adapters_over_peft": turns.ratio(DISTINCT, PEFT),
        },
        "rows": ROWS,
        "tokens": plan.round_tokens,
        "registered": len(bench.names),
        "zipf_exponent_over_all": MANY_EXPONENT,
    }


def draws(bench: Bench, server: Engine) -> Callable[[], Round]:
    """Other adapters each time."""
    seeds = count()

    def run() -> Round:
        chosen = choose("zipf", bench.names, ROWS, next(seeds), MANY_EXPONENT)
        return server.run(bench.requests([*chosen], bench.plan.round_tokens))

    return run


def some(bench: Bench, engine: Callable[[], Engine]) -> Callable[[], Round]:
    firsts = count(step=PEFT_REQUESTS)

    def run() -> Round:
        first = next(firsts) % ROWS
        requests: list[Request] = bench.requests([*bench.names[:ROWS]], bench.plan.round_tokens)
        return engine().run(requests[first : first + PEFT_REQUESTS])

    return run


def of_base_rows(_: str, each: Round) -> float:
    """Answers a second of a row that uses the base in both rounds, from its arrival on."""
    return 1 / fmean(answer.last - answer.arrived for answer in each.answers[::2])
