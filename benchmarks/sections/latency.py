"""How long users wait: by load, and beside a prompt as long as the window."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import typer

from benchmarks.arrivals import poisson
from benchmarks.bench import ROWS, WINDOW, Bench
from benchmarks.engines import Answer, Request
from benchmarks.sections.adapters import MANY_EXPONENT
from benchmarks.statistics import percentiles
from benchmarks.turns import ratio_of
from benchmarks.workload import choose, random_prompts


def measure_load(bench: Bench) -> dict[str, Any]:
    """Saturation in a closed loop, then Poisson arrivals at parts of it; Zipf over all adapters."""
    plan, server = bench.plan, bench.server()
    closed = bench.requests(adapters_of(bench, 3 * ROWS))
    saturation = len(closed) / server.run(closed, in_flight=ROWS).seconds
    typer.echo(f"  saturation: {saturation:.2f} requests/s")
    loads = {}
    for seed, (part, seconds) in enumerate(plan.loads.items()):
        rate = part * saturation
        count = max(10, round(rate * seconds))
        requests = bench.requests(adapters_of(bench, count), at=poisson(rate, count, seed))
        loads[f"{part:g}"] = waits(server.run(requests).answers, plan.tokens)
        typer.echo(f"  at {part:.0%}: {loads[f'{part:g}']['ttft_ms']}")
    half = loads["0.5"]["ttft_ms"]
    return {
        "saturation_requests_per_second": saturation,
        "loads": loads,
        "ratios": {"ttft_p99_over_p50_at_half_load": ratio_of([half["p99"] / half["p50"]])},
        "tokens": plan.tokens,
        "failed": {},
    }


def adapters_of(bench: Bench, count: int) -> list[str | None]:
    return [*choose("zipf", bench.names, count, exponent=MANY_EXPONENT)]


def waits(answers: Sequence[Answer], tokens_out: int) -> dict[str, Any]:
    """Milliseconds until the first token, and from each to the next."""
    first = [1e3 * (each.first - each.arrived) for each in answers if each.first is not None]
    between = [
        1e3 * (each.last - each.first) / (tokens_out - 1)
        for each in answers
        if each.first is not None
    ]
    return {
        "requests": len(answers),
        "ttft_ms": percentiles(first),
        "tpot_ms": percentiles(between),
    }


def measure_long_prompt(bench: Bench) -> dict[str, Any]:
    """31 short prompts that come just after one as long as the window."""
    tokens_out = bench.plan.tokens
    long = random_prompts(bench.model, 1, WINDOW - tokens_out, seed=1)[0]
    servers = {
        "in chunks": bench.server(),
        "at once": bench.server("infuse-unchunked", "--prefill-chunk-tokens", WINDOW),
    }
    names: list[str | None] = [*bench.names[1:ROWS]]
    short = [replace(each, at=0.05) for each in bench.requests(names)]
    requests = [Request(long, tokens_out), *short]
    answers: dict[str, list[Answer]] = {name: [] for name in servers}
    long_waits: dict[str, list[Answer]] = {name: [] for name in servers}
    for turn in range(math.ceil(bench.plan.repeats / 2)):
        for name in list(servers)[:: 1 if turn % 2 == 0 else -1]:
            found = servers[name].run(requests).answers
            long_waits[name].append(found[0])
            answers[name] += found[1:]
            typer.echo(f"  {name}: {waits(found[1:], tokens_out)['ttft_ms']}")
    return {
        "window": WINDOW,
        "short_prompts": len(short),
        "waits": {name: waits(mine, tokens_out) for name, mine in answers.items()},
        "long_waits": {name: waits(mine, tokens_out) for name, mine in long_waits.items()},
        "failed": {},
    }
