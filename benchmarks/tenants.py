"""What the flood of one tenant costs another: its time to the first token, with and without it.

`python -m benchmarks.tenants --help`. A flood sends, evenly, ten times what its key allows in a
minute, and is of one kind: generation, long prompts, grammars that are slow to compile, uploads,
chat templates or merges. Turns with each flood and without one alternate in one run: on a shared
machine only that means something.
"""

import asyncio
import io
import itertools
import json
import tempfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.arrivals import poisson
from benchmarks.engines import Request
from benchmarks.engines.client import BASE, ask
from benchmarks.engines.infuse_http import ServerProcess
from benchmarks.machine import machine
from benchmarks.statistics import percentiles
from benchmarks.workload import Template, random_prompts
from infuse.server.engine.model_files import default_model_folder

RESULTS = Path(__file__).parent / "results" / "tenants.json"
LIMIT = 1.5
"""The p99 beside a flood, over that without one, must be below."""
MANY = 10
"""How many times its quota a flood sends."""
WINDOW = 1024
PROMPT, ANSWER = 64, 8
"""Tokens of the other tenant's requests."""
OURS, OTHER = "flood/adapter", "other-tenants-key"
TEMPLATE = (
    "{% for n in range(2000) %}{{ '' }}{% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A flood, and the quota of its key."""

    a_minute: int
    """How many requests its quota allows."""
    body: Callable[[int], dict[str, Any]] = lambda _: {}
    path: str = "/v1/completions"
    scope: Mapping[str, Any] = field(default_factory=dict)
    """In place of `requests_per_minute`."""

    @property
    def entry(self) -> dict[str, Any]:
        limits = self.scope or {"requests_per_minute": self.a_minute}
        adapters = {"use": ["flood/*"], "change": ["flood/*"]}
        return limits | {"adapters": adapters, "max_requests_at_once": 4}


def prompt(number: int, tokens: int) -> list[int]:
    """That begins as no other."""
    return [1000 + number, *range(2000, 2000 + tokens - 1)]


LONG = WINDOW - 16
KINDS = {
    "generation": Kind(60, lambda n: {"model": BASE, "prompt": prompt(n, 64), "max_tokens": 32}),
    "long prompts": Kind(
        20,
        lambda n: {"model": BASE, "prompt": prompt(n, LONG), "max_tokens": 1},
        scope={"tokens_per_minute": 20 * (LONG + 1)},
    ),
    "grammars": Kind(
        30,
        lambda n: {
            "model": BASE,
            "prompt": "A number:",
            "max_tokens": 4,
            "structured_outputs": {"json": {"type": "integer", "multipleOf": 9_999_900 + n}},
        },
    ),
    "templates": Kind(
        60,
        lambda n: {
            "model": OURS,
            "messages": [{"role": "user", "content": f"Hello {n}"}],
            "max_tokens": 1,
        },
        "/v1/chat/completions",
    ),
    "uploads": Kind(60, path=f"/v1/adapters/{OURS}"),
    "merges": Kind(60, lambda _: {"adapter": OURS}, "/v1/merges"),
}


def main(
    turns: Annotated[int, typer.Option(min=1, help="With each flood.")] = 4,
    seconds: Annotated[float, typer.Option(help="Of a turn.")] = 20.0,
    rate: Annotated[float, typer.Option(help="Requests of the other tenant a second.")] = 4.0,
    output: Annotated[Path, typer.Option(help="The JSON.")] = RESULTS,
) -> None:
    model = default_model_folder()
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        template = Template(model, scratch / "by-peft")
        archives = [archive_of(template.files(number)) for number in range(2)]
        flags = (
            *("--served-model-name", BASE, "--max-model-len", WINDOW, "--max-batch-rows", 32),
            *("--adapters-dir", scratch / "store", "--keys-file", keys_file(scratch), "--compile"),
        )
        with ServerProcess(scratch / "server.log", *flags) as server:
            upload(server.url, archives[0])
            report = measure(server.url, model, archives, turns, seconds, rate)
    output.write_text(json.dumps(report, indent=1) + "\n")
    typer.echo(table(report))


def table(report: Mapping[str, Any]) -> str:
    lines = [f"{'without a flood':16} p99 {report['without']['p99']:6.0f} ms"]
    for name, found in report["floods"].items():
        times = f"{found['p99_over_without']:5.2f} times"
        lines.append(f"{name:16} p99 {found['ttft_ms']['p99']:6.0f} ms {times} {found['answers']}")
    return "\n".join(lines)


def key_of(kind: str) -> str:
    return f"key-of-the-flood-of-{kind.replace(' ', '-')}"


def keys_file(folder: Path) -> Path:
    keys: list[dict[str, Any]] = [{"name": "other", "key": OTHER, "roles": ["generate"]}]
    keys += [
        {"name": name, "key": key_of(name), "roles": ["generate", "admin"], "scope": kind.entry}
        for name, kind in KINDS.items()
    ]
    path = folder / "keys.json"
    path.write_text(json.dumps(keys))
    path.chmod(0o600)
    return path


def archive_of(files: Mapping[str, bytes]) -> bytes:
    """With a chat template of the adapter's own."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("chat_template.jinja", TEMPLATE)
    return written.getvalue()


def upload(url: str, archive: bytes) -> None:
    with httpx.Client(base_url=url, headers=headers_of("uploads"), timeout=60) as client:
        form = {"name": OURS}
        answer = client.post("/v1/adapters", data=form, files={"archive": archive})
        answer.raise_for_status()


def headers_of(kind: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key_of(kind)}"}


def measure(
    url: str,
    model: Path,
    archives: Sequence[bytes],
    turns: int,
    seconds: float,
    rate: float,
) -> dict[str, Any]:
    count = round(rate * seconds)
    prompts = iter(random_prompts(model, count * (2 * turns * len(KINDS) + 1), PROMPT))

    def ask_as_other(seed: int) -> list[float]:
        """Milliseconds until the first tokens."""
        times = poisson(rate, count, seed)
        asked = [Request(next(prompts), ANSWER, at=at) for at in times]
        answers = ask(url, asked, key=OTHER).answers
        return [1e3 * (each.first - each.arrived) for each in answers if each.first is not None]

    ask_as_other(0)
    without: list[float] = []
    beside: dict[str, list[float]] = {name: [] for name in KINDS}
    sent: dict[str, Counter[int]] = {name: Counter() for name in KINDS}
    for turn in range(turns):
        for seed, name in enumerate(KINDS, turn * len(KINDS)):
            without += ask_as_other(seed)
            with flooding(url, name, archives, sent[name]):
                beside[name] += ask_as_other(seed)
            typer.echo(f"  {turn + 1}/{turns} {name}")
    alone = percentiles(without)
    return {
        "machine": machine(),
        "workload": {
            "model": model.name,
            "prompt_tokens": PROMPT,
            "answer_tokens": ANSWER,
            "requests_a_second": rate,
            "requests_without": len(without),
            "requests_beside_each": turns * count,
            "times_its_quota": MANY,
        },
        "must_be_under": LIMIT,
        "without": alone,
        "floods": {
            name: {
                "ttft_ms": percentiles(found),
                "p99_over_without": percentiles(found)["p99"] / alone["p99"],
                "quota": KINDS[name].entry,
                "answers": {str(status): n for status, n in sorted(sent[name].items())},
            }
            for name, found in beside.items()
        },
    }


@contextmanager
def flooding(url: str, name: str, archives: Sequence[bytes], sent: Counter[int]) -> Iterator[None]:
    """Flood from a thread of its own; count the statuses of the answers in `sent`."""
    stop = threading.Event()
    flood = threading.Thread(target=lambda: asyncio.run(_flood(url, name, archives, sent, stop)))
    flood.start()
    try:
        yield
    finally:
        stop.set()
        flood.join()


async def _flood(
    url: str, name: str, archives: Sequence[bytes], sent: Counter[int], stop: threading.Event
) -> None:
    kind = KINDS[name]
    merges: list[str] = []

    async def send(number: int) -> None:
        if name == "uploads":
            archive = archives[number % len(archives)]
            answer = await client.put(kind.path, files={"archive": archive})
        else:
            if merges:
                # So that another can begin.
                await client.delete(f"{kind.path}/{merges.pop()}")
            answer = await client.post(kind.path, json=kind.body(number))
        if name == "merges" and answer.status_code == 202:
            merges.append(answer.json()["id"])
        sent[answer.status_code] += 1

    async with (
        httpx.AsyncClient(base_url=url, headers=headers_of(name), timeout=120) as client,
        asyncio.TaskGroup() as group,
    ):
        for number in itertools.count(sent.total()):
            if stop.is_set():
                return
            group.create_task(send(number))
            await asyncio.sleep(60 / (MANY * kind.a_minute))


if __name__ == "__main__":
    typer.run(main)
