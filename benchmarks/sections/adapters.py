"""What adapters cost beside the base, by their popularity, and against PEFT.

Over HTTP, streaming, on servers that have all adapters registered.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from benchmarks.bench import ROWS, Bench
from benchmarks.engines import Engine, Round
from benchmarks.turns import Side, Turns, report, take_turns
from benchmarks.workload import choose

PEFT_REQUESTS = 2
"""Of the 32, others in each turn: one after the other, the rest would take as long each."""
MANY_EXPONENT = 1.0
"""Flatter than Punica's: most of 32 rows then use an adapter each, and many of them a cold one."""

BASE = "base"
IDENTICAL = "1 adapter (identical)"
UNIFORM = "6 adapters (uniform)"
SKEWED = "Zipf over 32 adapters"
DISTINCT = "32 adapters (distinct)"
MANY = "Zipf over all registered"
BY_SKEW = {
    IDENTICAL: "identical_over_base",
    UNIFORM: "uniform_over_base",
    SKEWED: "skewed_over_base",
    DISTINCT: "adapters_over_base",
    MANY: "many_over_base",
}
"""Ratios by what is compared."""
BESIDE = "16 base rows beside 16 adapters"
PEFT = "PEFT, one adapter after the other"


def measure(bench: Bench) -> dict[str, Any]:
    plan = bench.plan
    few = bench.names[:ROWS]
    half = [name if row % 2 else None for row, name in enumerate(few)]
    seeds = count()

    def many() -> list[str]:
        return choose("zipf", bench.names, ROWS, next(seeds), MANY_EXPONENT)

    kinds: dict[str, Callable[[], Sequence[str | None]]] = {DISTINCT: lambda: few}
    if plan.adapter_turns > 2:
        kinds |= {MANY: many, BESIDE: lambda: half}
    judged = crossing(bench, kinds, plan.adapter_turns)
    others = crossing(
        bench,
        {
            IDENTICAL: lambda: choose("identical", few, ROWS),
            UNIFORM: lambda: choose("uniform", few, ROWS),
            SKEWED: lambda: choose("zipf", few, ROWS),
        },
        plan.skew_turns,
    )
    peft = beside_peft(bench)
    return report(judged, others, peft) | {
        "ratios": {
            **{
                ratio: turns.ratio(name, BASE)
                for name, ratio in BY_SKEW.items()
                for turns in (judged, others)
                if name in turns.rounds
            },
            "base_beside_adapters_over_alone": judged.ratio(BESIDE, BASE, of_base_rows),
            "adapters_over_peft": peft.ratio(DISTINCT, PEFT),
        },
        "rows": ROWS,
        "tokens": plan.round_tokens,
        "registered": len(bench.names),
        "zipf_exponent_over_all": MANY_EXPONENT,
    }


def crossing(
    bench: Bench, adapters: Mapping[str, Callable[[], Sequence[str | None]]], turns: int
) -> Turns:
    """What each gives for a round, and the base: on as many servers, each in turn on every one."""
    tokens = bench.plan.round_tokens

    def side(number: int, name: str, chosen: Callable[[], Sequence[str | None]]) -> Side:
        return Side(
            name,
            lambda: bench.replica(number),
            lambda server: server.run(bench.requests(chosen(), tokens)),
            ROWS * tokens,
        )

    asked = {**adapters, BASE: lambda: [None] * ROWS}
    sides = [side(number, *each) for number, each in enumerate(asked.items())]
    return take_turns(sides, turns, crossed=True)


def beside_peft(bench: Bench) -> Turns:
    tokens = bench.plan.round_tokens
    requests = bench.requests([*bench.names[:ROWS]], tokens)
    firsts = count(step=PEFT_REQUESTS)

    def ask_some(engine: Engine) -> Round:
        first = next(firsts) % ROWS
        return engine.run(requests[first : first + PEFT_REQUESTS])

    sides = [
        Side(DISTINCT, bench.server, lambda engine: engine.run(requests), ROWS * tokens),
        Side(PEFT, bench.peft, ask_some, PEFT_REQUESTS * tokens),
    ]
    return take_turns(sides, bench.plan.peft_turns)


def of_base_rows(_: str, each: Round) -> float:
    """Answers a second of the rows that use the base in both rounds, until all of them have theirs.

    Which of them begin a step earlier is the fair queue's choice, not what adapters cost.
    """
    return len(each.answers[::2]) / max(answer.last for answer in each.answers[::2])
