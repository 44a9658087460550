"""What the server holds in memory, by how many adapters are registered and how many are in use."""

from typing import Any

import typer

from benchmarks.bench import ROWS, Bench
from benchmarks.engines import Request

RESIDENT = (0, 1, 8, 32, 128, 512)
"""Adapters in use, on a server with slots for all of them."""


def measure(bench: Bench) -> dict[str, Any]:
    slots = ("--max-resident-adapters", max(RESIDENT))
    bench.stop("infuse")
    used = bench.server("infuse-memory", *slots, store=bench.store)
    points = []
    asked = 0
    for adapters in RESIDENT:
        # Each adapter is asked for one token: the batch stays as it is, whatever its size.
        names = bench.names[asked:adapters]
        requests = [Request(bench.prompts[0][:4], 1, name) for name in names]
        if requests:
            used.run(requests, in_flight=ROWS)
        asked = adapters
        points.append({"adapters": adapters, **used.memory()})
        typer.echo(f"  {adapters} in use: {points[-1]['resident'] / 1e6:.0f} MB")
    bench.stop("infuse-memory")
    return {"registered": len(bench.names), "in_use": points, "failed": {}}
