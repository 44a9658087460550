"""10,000 adapters in one folder: start-up, uploads, list pages, and the first token of a cold one.

`python -m benchmarks.registry --help`. "Cold" is an adapter that was never asked for: it is not on
the device, and its files are in the page cache, or on the disk alone. What is compared is asked in
turns, in one run: on a shared machine only that means something.
"""

import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

from benchmarks.bench import adapter_name, register
from benchmarks.engines.infuse_http import ServerProcess
from benchmarks.machine import machine
from benchmarks.statistics import summary
from benchmarks.workload import FEEDFORWARD, TARGETS, Template
from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine.model_files import default_model_folder

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 8
"""Few: what an adapter costs does not grow with the prompt, and the noise of a step does."""
_TARGETS = {
    "startup_seconds_beyond_the_models": 5.0,
    "list_page_seconds": 0.050,
    "cold_first_token_seconds_beyond_warm": 0.010,
}
"""What each must stay under."""


def main(
    adapters: Annotated[int, typer.Option(min=500, help="How many are registered.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=2, help="Requests of each kind.")] = 200,
    starts: Annotated[int, typer.Option(min=1, help="Starts with each folder.")] = 5,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where they are made, or were by a run before. Default: a folder that "
            "goes afterwards."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS / "registry.json",
) -> None:
    model = default_model_folder()
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "few", (folder or Path(scratch)) / "many"
        template = Template(model, Path(scratch) / "by-peft")
        register(many, template, adapters)
        starting(clock, few, many, Path(scratch), starts)
        with serve(few, Path(scratch)) as first, serve(many, Path(scratch)) as second:
            uploads(clock, {"few": first.url, "many": second.url}, template, rounds)
            with httpx.Client(base_url=second.url, timeout=60) as client:
                lists(clock, client, adapters, rounds)
                first_tokens(clock, client, many, adapters, rounds)
    report = {
        "machine": machine(),
        "workload": {
            "model": model.name,
            "adapters": adapters,
            "bytes_of_an_adapter": template.nbytes,
            "target_modules": TARGETS,
            "feedforward_modules": FEEDFORWARD,
            "prompt_tokens": PROMPT_TOKENS,
        },
        "figures": figures(clock.seconds),
        "must_be_under": _TARGETS,
        "seconds": {
            name: summary(values) | {"count": len(values)} for name, values in clock.seconds.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(table(report))
    typer.echo(f"Written to {output}")


class Clock:
    """What took how long, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)


def starting(clock: Clock, few: Path, many: Path, scratch: Path, starts: int) -> None:
    """The store by itself, and whole servers, whose loading of the model varies by seconds."""
    for _ in range(starts):
        with clock.time("open the store"):
            store = AdapterStore(many)
        store.close()
        for name, folder in {"start beside few": few, "start beside many": many}.items():
            with serve(folder, scratch) as server:
                clock.add(name, server.start_seconds)


@contextmanager
def serve(store: Path, scratch: Path) -> Iterator[ServerProcess]:
    flags = ("--served-model-name", "base", "--max-model-len", 512, "--kv-cache-tokens", 4096)
    with ServerProcess(scratch / f"{store.name}.log", "--adapters-dir", store, *flags) as server:
        yield server


def uploads(clock: Clock, urls: dict[str, str], template: Template, rounds: int) -> None:
    """New adapters over HTTP, beside few others and beside many; they are deleted again."""
    with httpx.Client(timeout=60) as client:
        for number in range(rounds):
            form = {"name": f"uploaded-{number}"}
            data = template.files(1_000_000 + number)
            files = {"config": data[CONFIG_FILE], "weights": data[WEIGHTS_FILE]}
            for beside, url in urls.items():
                with clock.time(f"upload beside {beside}"):
                    answer = client.post(f"{url}/v1/adapters", data=form, files=files)
                answer.raise_for_status()
        for number in range(rounds):
            for beside, url in urls.items():
                with clock.time(f"delete beside {beside}"):
                    answer = client.delete(f"{url}/v1/adapters/uploaded-{number}")
                answer.raise_for_status()


def lists(clock: Clock, client: httpx.Client, adapters: int, rounds: int) -> None:
    """Pages from anywhere in the list, and what shows every adapter at once."""
    rng = random.Random(0)
    for _ in range(rounds):
        for name, path in {
            "list page of 100": "/v1/adapters?limit=100&after={}",
            "list page of 1000": "/v1/adapters?limit=1000&after={}",
            "one adapter": "/v1/adapters/{}",
            "models (all)": "/v1/models",
            "metrics": "/metrics",
        }.items():
            after = adapter_name(rng.randrange(adapters - 100))
            with clock.time(name):
                client.get(path.format(after)).raise_for_status()


def first_tokens(
    clock: Clock, client: httpx.Client, store: Path, adapters: int, rounds: int
) -> None:
    """Until the first event of a stream. Every prompt is new, so that no prefix is shared."""
    rng = random.Random(1)
    names = [adapter_name(number) for number in rng.sample(range(1, adapters), 2 * rounds)]
    # The first of all makes the bank's columns.
    client.post(
        "/v1/completions", json={"model": adapter_name(0), "prompt": [1000], "max_tokens": 1}
    )
    for cached, uncached in zip(names[:rounds], names[rounds:], strict=True):
        for file in files_of(client, store, cached):
            file.read_bytes()
        for file in files_of(client, store, uncached):
            drop_from_page_cache(file)
        for group, name in {
            "base": "base",
            "cold": cached,
            "warm": cached,
            "cold, from disk": uncached,
        }.items():
            body = {
                "model": name,
                "prompt": [rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)],
                "max_tokens": 1,
                "temperature": 0,
                "stream": True,
            }
            began = time.perf_counter()
            with client.stream("POST", "/v1/completions", json=body) as response:
                response.raise_for_status()
                lines = response.iter_lines()
                next(line for line in lines if line.startswith("data: "))
                clock.add(f"first token, {group}", time.perf_counter() - began)
                # Read to its end, a connection is used again.
                list(lines)


def files_of(client: httpx.Client, store: Path, name: str) -> list[Path]:
    digest = client.get(f"/v1/adapters/{name}").json()["digest"]
    return list((store / "content" / digest).iterdir())


def drop_from_page_cache(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def figures(seconds: dict[str, list[float]]) -> dict[str, float]:
    middle = {name: median(values) for name, values in seconds.items()}

    def beyond(name: str, other: str) -> float:
        """The median of what each turn took longer than the other of the same turn."""
        return median(a - b for a, b in zip(seconds[name], seconds[other], strict=True))

    return {
        "store_open_seconds": middle["open the store"],
        "startup_seconds_beyond_the_models": beyond("start beside many", "start beside few"),
        "list_page_seconds": middle["list page of 100"],
        "upload_over_an_upload_beside_few": middle["upload beside many"]
        / middle["upload beside few"],
        "cold_first_token_seconds_beyond_warm": beyond("first token, cold", "first token, warm"),
        "cold_from_disk_first_token_seconds_beyond_warm": beyond(
            "first token, cold, from disk", "first token, warm"
        ),
    }


def table(report: dict[str, Any]) -> str:
    lines = [f"{'':34}{'median':>10}{'quartiles':>22}  milliseconds"]
    for name, s in report["seconds"].items():
        spread = f"{1e3 * s['lower_quartile']:.1f} to {1e3 * s['upper_quartile']:.1f}"
        lines.append(f"{name:34}{1e3 * s['median']:10.1f}{spread:>22}")
    for name, value in report["figures"].items():
        limit = report["must_be_under"].get(name)
        lines.append(f"{name}: {value:.4f}" + ("" if limit is None else f" (under {limit})"))
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
