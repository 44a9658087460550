"""The whole benchmark: `make bench`, `make bench-quick`, or `python -m benchmarks --help`.

All engines answer the same prompts, in turns, in one run: only the ratios mean something on a
shared machine. Each section's figures go into the JSON with the machine, the versions and the
commit that they are of, and docs/performance.md is written from it.
"""

import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import peers
from benchmarks.bench import FULL, QUICK, Bench
from benchmarks.engines import EngineFailed
from benchmarks.machine import machine
from benchmarks.report import RESULTS, write_page
from benchmarks.sections import SECTIONS
from benchmarks.tables import page

QUICK_RESULTS = RESULTS.with_name("quick.json")


def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"Sections to run: {', '.join(SECTIONS)}.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few turns of each: a smoke test, not a result.")
    ] = False,
) -> None:
    if unknown := set(only or ()) - set(SECTIONS):
        raise typer.BadParameter(f"no section {', '.join(sorted(unknown))}")
    # A run that is ended from outside ends its engines too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    output = QUICK_RESULTS if quick else RESULTS
    try:
        peers.install_vllm()
    except (OSError, peers.InstallFailed) as error:
        typer.echo(f"vLLM could not be installed, its sections will say so: {error}")
    began = time.perf_counter()
    with Bench.session(QUICK if quick else FULL) as bench:
        bench.prepare()
        typer.echo(f"prepared in {time.perf_counter() - began:.0f} s")
        for name in only or bench.plan.sections or SECTIONS:
            typer.echo(name)
            keep(output, name, measure(bench, name))
            bench.keep_only("infuse", "infuse-inprocess")
    typer.echo(f"{output}, in {(time.perf_counter() - began) / 60:.1f} minutes")
    if quick:
        typer.echo(page(json.loads(output.read_text())))
    else:
        typer.echo(f"{write_page()} written")


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """A section's figures; where it could not be measured, why."""
    began = time.perf_counter()
    try:
        found = SECTIONS[name](bench)
    except EngineFailed as error:
        found = {"failed": {name: str(error)}}
    except Exception as error:  # One section's fault must not cost the others.
        traceback.print_exc()
        found = {"failed": {name: f"{type(error).__name__}: {error}"}}
    for failed, reason in found.get("failed", {}).items():
        typer.echo(f"  FAILED {failed}: {reason}")
    return found | {"machine": machine(), "took_seconds": time.perf_counter() - began}


def keep(output: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the JSON, beside those of other runs."""
    sections = json.loads(output.read_text()) if output.exists() else {}
    sections[name] = section
    output.parent.mkdir(parents=True, exist_ok=True)
    ordered = {each: sections[each] for each in SECTIONS if each in sections}
    output.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
