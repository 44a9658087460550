"""32 adapters in one batch against the base alone, and against PEFT swapping them in turn.

`make bench`, or `python -m benchmarks --help`. All three answer the same prompts, in turns, in one
run: only the ratios mean something on a shared machine.
"""

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.infuse import InfuseServer, Round
from benchmarks.machine import machine
from benchmarks.peft_swap import PeftSwap
from benchmarks.statistics import lower_bound_of_median, summary
from benchmarks.workload import FEEDFORWARD, TARGETS, make_workload
from server.engine.loading import default_model_folder

RESULTS = Path(__file__).parent / "results"
OTHER_BYTES = 700_000_000
"""What the server may take beside weights, cache and bank: the runtime, and working memory."""


def main(
    pairs: Annotated[int, typer.Option(min=5, help="Turns of (a) adapters and (b) base.")] = 20,
    peft_rounds: Annotated[int, typer.Option(min=1, help="Turns of (c) PEFT.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 32,
    tokens_in: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 64,
    tokens_out: Annotated[int, typer.Option(min=2, help="Generated tokens.")] = 64,
    output: Annotated[
        Path | None, typer.Option(help="The JSON. Default: benchmarks/results/serving.json.")
    ] = None,
) -> None:
    model = default_model_folder()
    where = machine()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        workload = make_workload(model, folder / "adapters", rows, tokens_in, tokens_out)
        peft = PeftSwap(workload, model)
        with InfuseServer(workload, model, folder) as server:
            systems = {
                "adapters": lambda: server.run(workload.adapters),
                "base": lambda: server.run(["base"] * rows),
                "peft": peft.run,
            }
            for name in ("adapters", "base"):
                systems[name]()
            rounds: dict[str, list[Round]] = {name: [] for name in systems}
            for name in turns(pairs, peft_rounds):
                rounds[name].append(systems[name]())
                speed = rows * tokens_out / rounds[name][-1].seconds
                typer.echo(f"{name:9} {speed:7.1f} tokens/s")
            memory = server.memory()
    report = {
        "machine": where,
        "workload": {
            "model": model.name,
            "dtype": "float32",
            "rows": rows,
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "target_modules": TARGETS,
            "feedforward_modules": FEEDFORWARD,
        },
        **figures(rounds, rows * tokens_out),
        "memory_bytes": memory | {"other": other_bytes(memory), "other_allowed": OTHER_BYTES},
    }
    path = output or RESULTS / "serving.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(table(report))
    typer.echo(f"Written to {path}")


def turns(pairs: int, peft_rounds: int) -> list[str]:
    """Pairs in changing order, PEFT spread over them, so that a drift meets all alike."""
    order = []
    for pair in range(pairs):
        order += ["adapters", "base"] if pair % 2 == 0 else ["base", "adapters"]
        if (pair + 1) * peft_rounds // pairs > pair * peft_rounds // pairs:
            order.append("peft")
    return order


def figures(rounds: dict[str, list[Round]], tokens: int) -> dict[str, Any]:
    speeds = {name: [tokens / each.seconds for each in mine] for name, mine in rounds.items()}
    ratios = [a / b for a, b in zip(speeds["adapters"], speeds["base"], strict=True)]
    exact = zip(rounds["adapters"][0].texts, rounds["peft"][0].texts, strict=True)
    return {
        "tokens_per_second": {name: summary(mine) for name, mine in speeds.items()},
        "adapters_over_base": summary(ratios)
        | {"pairs": len(ratios), "lower_95_bound_of_median": lower_bound_of_median(ratios)},
        "adapters_over_peft": median(speeds["adapters"]) / median(speeds["peft"]),
        "rows_with_pefts_text": sum(mine == theirs for mine, theirs in exact),
        "seconds": {name: [each.seconds for each in mine] for name, mine in rounds.items()},
    }


def other_bytes(memory: dict[str, int]) -> int:
    """The peak, less the weights and what was planned for cache and bank."""
    return memory["peak"] - memory["weights"] - memory["kv_cache"] - memory["bank"]


def table(report: dict[str, Any]) -> str:
    speeds = report["tokens_per_second"]
    ratio, memory = report["adapters_over_base"], report["memory_bytes"]
    rows = report["workload"]["rows"]
    lines = [f"{'':34}{'median':>9}{'quartiles':>18}  tokens/s"]
    for name, text in {
        "adapters": f"(a) {rows} requests, {rows} adapters",
        "base": f"(b) {rows} requests, the base",
        "peft": "(c) PEFT, one adapter at a time",
    }.items():
        s = speeds[name]
        spread = f"{s['lower_quartile']:.1f} to {s['upper_quartile']:.1f}"
        lines.append(f"{text:34}{s['median']:9.1f}{spread:>18}")
    lines += [
        f"(a) / (b): median {ratio['median']:.3f}, at least "
        f"{ratio['lower_95_bound_of_median']:.3f} (95%, {ratio['pairs']} pairs)",
        f"(a) / (c): {report['adapters_over_peft']:.1f}",
        f"Rows whose text is PEFT's: {report['rows_with_pefts_text']} of {rows}",
        f"Peak memory: {memory['peak'] / 1e6:.0f} MB = {memory['weights'] / 1e6:.0f} weights + "
        f"{memory['other'] / 1e6:.0f} beside the plan of {memory['kv_cache'] / 1e6:.0f} cache and "
        f"{memory['bank'] / 1e6:.0f} bank",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
