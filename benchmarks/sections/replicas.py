"""Several servers on one store: plain ones that are asked in turn, and replicas on Ray, among which
its proxy chooses; beside one server with all of the machine.
"""

import os
from typing import Any

import typer

from benchmarks.bench import ROWS, Bench
from benchmarks.engines import EngineFailed
from benchmarks.engines.client import ask
from benchmarks.turns import Turns, report

SERVERS = 2
ONE = "1 server"
PLAIN = f"{SERVERS} servers, asked in turn"
RAY = f"{SERVERS} replicas of infuse deploy"


def measure(bench: Bench) -> dict[str, Any]:
    cores = os.cpu_count() or 1
    share = max(1, cores // SERVERS)
    plan = bench.plan
    requests = bench.requests([*bench.names[:ROWS]])
    turns = Turns(
        rounds={name: [] for name in (ONE, PLAIN, RAY)},
        tokens=dict.fromkeys((ONE, PLAIN, RAY), ROWS * plan.tokens),
    )
    urls = {
        ONE: [bench.sharing("infuse-alone", threads=cores, command="serve").url],
        PLAIN: [
            bench.sharing(f"infuse-{number}", threads=share, command="serve").url
            for number in range(SERVERS)
        ],
    }
    try:
        flags = ("--replicas", SERVERS)
        urls[RAY] = [bench.sharing("infuse-ray", *flags, threads=share, command="deploy").url]
    except EngineFailed as error:
        turns.failed[RAY] = str(error)
    for turn in range(plan.replica_turns):
        for name in list(urls)[:: -1 if turn % 2 else 1]:
            round_ = ask(urls[name], requests)
            turns.rounds[name].append(round_)
            typer.echo(f"  {name:34} {turns.speeds(name)[-1]:7.1f} tokens/s")
    return report(turns) | {
        "ratios": {
            "plain_over_one": turns.ratio(PLAIN, ONE),
            "ray_over_plain": turns.ratio(RAY, PLAIN),
        },
        "servers": SERVERS,
        "tokens": plan.tokens,
    }
