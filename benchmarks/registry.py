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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import torch
import typer
from safetensors.torch import load_file, save

from adapters.config import CONFIG_FILE, WEIGHTS_FILE
from adapters.store import AdapterStore
from benchmarks.infuse import ServerProcess
from benchmarks.machine import machine
from benchmarks.statistics import summary
from benchmarks.workload import FEEDFORWARD, TARGETS, Workload, make_workload
from server.engine.loading import default_model_folder

RESULTS = Path(__file__).parent / "results"
PROMPT_TOKENS = 32
UPLOADED = "uploaded-{}"
_TARGETS = {
    "startup_seconds_beyond_the_models": 5.0,
    "list_page_seconds": 0.050,
    "cold_first_token_seconds_beyond_warm": 0.010,
}
"""What each must stay under."""


def main(
    adapters: Annotated[int, typer.Option(min=300, help="How many are registered.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=2, help="Requests of each kind.")] = 100,
    starts: Annotated[int, typer.Option(min=1, help="Starts with each folder.")] = 3,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Where they are made, or were by a run before. Default: a folder that "
            "goes afterwards."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS / "registry.json",
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch) / "store", (folder or Path(scratch)) / "many"
        model = default_model_folder()
        workload = make_workload(model, Path(scratch) / "by-peft", 1, PROMPT_TOKENS, 1)
        template = Template(workload)
        filled = fill(many, template, adapters)
        seconds: dict[str, list[float]] = {
            "open the store": [],
            "start, few": [],
            "start, many": [],
        }
        for _ in range(starts):
            seconds["open the store"].append(open_seconds(many))
            for name, store in (("start, few", few), ("start, many", many)):
                with serve(store, Path(scratch)) as server:
                    seconds[name].append(server.start_seconds)
        with serve(few, Path(scratch)) as first, serve(many, Path(scratch)) as second:
            urls = {"few": first.url, "many": second.url}
            seconds |= uploads(urls, template, rounds)
            with httpx.Client(base_url=second.url, timeout=60) as client:
                seconds |= lists(client, adapters, rounds)
                seconds |= first_tokens(client, many, adapters, rounds)
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
        "figures": figures(seconds),
        "must_be_under": _TARGETS,
        "store_fill": filled,
        "seconds": {
            name: summary(values) | {"count": len(values)} for name, values in seconds.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n")
    typer.echo(table(report))
    typer.echo(f"Written to {output}")


class Template:
    """Makes adapters of the shape of one that PEFT has saved, with vectors of their own near 1."""

    def __init__(self, workload: Workload) -> None:
        folder = workload.adapters_folder / workload.adapters[0]
        self._config = (folder / CONFIG_FILE).read_bytes()
        self._tensors = load_file(folder / WEIGHTS_FILE)
        self.nbytes = (folder / WEIGHTS_FILE).stat().st_size

    def files(self, seed: int) -> dict[str, bytes]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: 1.0 + 0.05 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in self._tensors.items()
        }
        return {CONFIG_FILE: self._config, WEIGHTS_FILE: save(tensors, {"format": "pt"})}


def name_of(number: int) -> str:
    return f"adapter-{number:05}"


def fill(folder: Path, template: Template, adapters: int) -> dict[str, float]:
    """Register what is not there yet; the store's own seconds for the first and last 100."""
    store = AdapterStore(folder)
    seconds = []
    for number in range(adapters):
        if name_of(number) in store:
            continue
        with store.staging() as staged:
            for file, data in template.files(number).items():
                (staged / file).write_bytes(data)
            began = time.perf_counter()
            store.create(name_of(number), staged)
            seconds.append(time.perf_counter() - began)
        if len(seconds) % 1000 == 0:
            typer.echo(f"{number + 1} adapters")
    store.close()
    if len(seconds) < 200:
        return {}
    return {"first_100_median": median(seconds[:100]), "last_100_median": median(seconds[-100:])}


def open_seconds(folder: Path) -> float:
    began = time.perf_counter()
    store = AdapterStore(folder)
    seconds = time.perf_counter() - began
    store.close()
    return seconds


@contextmanager
def serve(store: Path, scratch: Path) -> Iterator[ServerProcess]:
    flags = ("--served-model-name", "base", "--max-model-len", 512, "--kv-cache-tokens", 4096)
    with ServerProcess(scratch / f"{store.name}.log", "--adapters-dir", store, *flags) as server:
        yield server


def uploads(urls: dict[str, str], template: Template, rounds: int) -> dict[str, list[float]]:
    """New adapters over HTTP, beside few others and beside many; they are deleted again."""
    seconds: dict[str, list[float]] = {}
    with httpx.Client(timeout=60) as client:
        for number in range(rounds):
            name = UPLOADED.format(number)
            data = template.files(1_000_000 + number)
            files = {"config": data[CONFIG_FILE], "weights": data[WEIGHTS_FILE]}
            for beside, url in urls.items():
                began = time.perf_counter()
                client.post(
                    f"{url}/v1/adapters", data={"name": name}, files=files
                ).raise_for_status()
                seconds.setdefault(f"upload, beside {beside}", []).append(
                    time.perf_counter() - began
                )
        for number in range(rounds):
            for beside, url in urls.items():
                began = time.perf_counter()
                client.delete(f"{url}/v1/adapters/{UPLOADED.format(number)}").raise_for_status()
                seconds.setdefault(f"delete, beside {beside}", []).append(
                    time.perf_counter() - began
                )
    return seconds


def lists(client: httpx.Client, adapters: int, rounds: int) -> dict[str, list[float]]:
    """Pages from anywhere in the list, and what shows every adapter at once."""
    rng = random.Random(0)
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, path in {
            "list page of 100": "/v1/adapters?limit=100&after={}",
            "list page of 1000": "/v1/adapters?limit=1000&after={}",
            "one adapter": "/v1/adapters/{}",
            "models (all)": "/v1/models",
            "metrics": "/metrics",
        }.items():
            began = time.perf_counter()
            after = name_of(rng.randrange(adapters - 100))
            client.get(path.format(after)).raise_for_status()
            seconds.setdefault(name, []).append(time.perf_counter() - began)
    return seconds


def first_tokens(
    client: httpx.Client, store: Path, adapters: int, rounds: int
) -> dict[str, list[float]]:
    """Until the first event of a stream. Every prompt is new, so that no prefix is shared."""
    rng = random.Random(1)
    names = [name_of(number) for number in rng.sample(range(adapters), 2 * rounds)]
    seconds: dict[str, list[float]] = {}
    for cached, uncached in zip(names[:rounds], names[rounds:], strict=True):
        drop_from_page_cache(client, store, uncached)
        for group, name in (
            ("base", "base"),
            ("cold", cached),
            ("warm", cached),
            ("cold, from disk", uncached),
        ):
            body = {
                "model": name,
                "prompt": [rng.randrange(1000, 40_000) for _ in range(PROMPT_TOKENS)],
                "max_tokens": 1,
                "temperature": 0,
                "stream": True,
            }
            seconds.setdefault(f"first token, {group}", []).append(first_event(client, body))
    return seconds


def first_event(client: httpx.Client, body: dict[str, Any]) -> float:
    began = time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        lines: Iterable[str] = response.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        return time.perf_counter() - began


def drop_from_page_cache(client: httpx.Client, store: Path, name: str) -> None:
    digest = client.get(f"/v1/adapters/{name}").json()["digest"]
    for file in (store / "content" / digest).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def figures(seconds: dict[str, list[float]]) -> dict[str, float]:
    middle = {name: median(values) for name, values in seconds.items()}

    def beyond(name: str, other: str) -> float:
        """The median of what each turn took longer than the other of the same turn."""
        return median(a - b for a, b in zip(seconds[name], seconds[other], strict=True))

    return {
        "startup_seconds_beyond_the_models": beyond("start, many", "start, few"),
        "list_page_seconds": middle["list page of 100"],
        "upload_over_an_upload_beside_few": middle["upload, beside many"]
        / middle["upload, beside few"],
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
