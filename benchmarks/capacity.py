"""What the capacity plan in docs/guide/operations.md says: `python -m benchmarks.capacity`.

Replicas are simulated on a virtual clock (fleet.py), requests to a bucket are counted
(store_requests.py), a journal of many changes is read, and the rest is arithmetic. Speeds come from
the committed results of the other benchmarks. `--only-page` writes the tables anew.
"""

import json
import tempfile
import time
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from benchmarks import report, store_requests
from benchmarks.fleet import Fleet, Routing, Speed, run
from benchmarks.machine import machine
from benchmarks.sections.adapters import MANY_EXPONENT
from benchmarks.tables import table
from infuse.adapters.storage.chain import chained_line, digest_of_line
from infuse.adapters.storage.revision import Origin, Revision, revision_to_json
from infuse.adapters.storage.store import AdapterStore

RESULTS = report.RESULTS.with_name("capacity.json")
PAGE = RESULTS.parents[2] / "docs" / "guide" / "operations.md"

ADAPTERS, REPLICAS = (10, 1_000, 10_000), (1, 10, 100)
LOAD = 0.7
SLOTS, ROWS, HOST_BYTES, REVISIONS = 256, 32, 512 << 20, 10
"""The defaults of --max-resident-adapters, --max-batch-rows, --max-host-adapter-bytes and
--keep-revisions."""
MODELS = {
    "SmolLM2-135M": (30, 192 + 192 + 1536),
    "Llama-3.2-3B": (28, 1024 + 1024 + 8192),
    "Qwen2.5-7B": (28, 3584 + 512 + 18944),
    "Llama-3.1-8B": (32, 1024 + 1024 + 14336),
    "Llama-3.3-70B": (80, 1024 + 1024 + 28672),
}
"""Layers, and numbers of an adapter in each: with PEFT's default targets the widths of two
projections of the attention (keys or queries, and values) and of the feed-forward."""
FLOAT32 = 4
DOLLARS = {"GET": 0.4e-6, "PUT": 5e-6, "LIST": 5e-6, "DELETE": 0.0}
"""For a request: S3 Standard's list price in us-east-1."""
MONTH = 30 * 24 * 3600
EVENTS = 100_000


def main(
    only_page: Annotated[bool, typer.Option(help="Of the committed JSON.")] = False,
) -> None:
    if not only_page:
        RESULTS.write_text(json.dumps(measured(), indent=1) + "\n")
    page = PAGE.read_text()
    for name, text in tables(json.loads(RESULTS.read_text())).items():
        page = with_table(page, name, text)
    PAGE.write_text(page)
    typer.echo(f"{PAGE} written")


def measured() -> dict[str, Any]:
    results, registry = report.results(), report.RESULTS.with_name("registry.json")
    speed = speed_of(results, json.loads(registry.read_text()))
    cells = [
        Fleet(
            replicas=replicas,
            adapters=adapters,
            routing=routing,
            speed=speed,
            load=LOAD,
            slots=SLOTS,
            host_adapters=HOST_BYTES // bytes_of("SmolLM2-135M"),
        )
        for replicas, adapters, routing in product(REPLICAS, ADAPTERS, get_args(Routing))
        if replicas > 1 or routing == "by adapter"
    ]
    fleets = []
    for cell in cells:
        fleets.append(run(cell))
        typer.echo(f"{cell.replicas} replicas, {cell.adapters} adapters, {cell.routing}")
    return {
        "machine": machine(),
        "beside_measured": beside_measured(speed, results["load"]),
        "fleets": fleets,
        "store_requests": [store_requests.count(replicas) for replicas in REPLICAS],
        "journal": journal(EVENTS),
    }


def speed_of(found: dict[str, Any], registry: dict[str, Any]) -> Speed:
    """A step of one row and one of 32 were measured: the line through both. A slot that is filled
    costs at most what the first token of a cold adapter takes longer."""
    one = 1 / found["peers"]["tokens_per_second"]["Infuse, base, 1 in flight"]["median"]
    full = [*found["profile"]["steps"].values()][-1]
    assert full["rows"] == ROWS
    token = (full["step_ms"] / 1e3 - one) / (ROWS - 1)
    fill = registry["figures"]["cold_first_token_seconds_beyond_warm"]
    return Speed(step=one - token, token=token, fill=fill)


def beside_measured(speed: Speed, load: dict[str, Any]) -> dict[str, Any]:
    """The simulation of what the benchmark's section "load" has measured, at the same rates."""
    tokens = load["tokens"]
    saturation = speed.saturation(ROWS, tokens, tokens)
    return {
        part: {
            "measured": waits["ttft_ms"],
            "simulated": run(
                Fleet(
                    replicas=1,
                    adapters=10_000,
                    routing="by adapter",
                    speed=speed,
                    load=float(part) * load["saturation_requests_per_second"] / saturation,
                    prompt=tokens,
                    answer=tokens,
                    exponent=MANY_EXPONENT,
                    requests=1000,
                )
            )["ttft_ms"],
        }
        for part, waits in load["loads"].items()
    }


def journal(events: int) -> dict[str, float]:
    """A folder's journal of ten revisions of each adapter, and how long a start reads it."""
    digest, lines = "", []
    for number in range(events):
        revision = Revision(
            name=f"adapter-{number // REVISIONS:05}",
            number=number % REVISIONS + 1,
            digest=digest_of_line(str(number).encode()),
            created=datetime.now(UTC),
            size=241_152,
            origin=Origin(by="ci"),
        )
        now = datetime.now(UTC).isoformat()
        event = {"time": now, "event": "revision", "name": revision.name, "by": "ci"}
        line = chained_line({**event, **revision_to_json(revision), "dropped": 0}, digest)
        digest = digest_of_line(line)
        lines.append(line + b"\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        path.write_bytes(b"".join(lines))
        seconds = []
        for _ in range(3):
            begun = time.process_time()
            AdapterStore(Path(folder)).close()
            seconds.append(time.process_time() - begun)
        size = path.stat().st_size
    return {
        "events": events,
        "bytes_per_event": size / events,
        "microseconds_per_event": 1e6 * min(seconds) / events,
    }


def bytes_of(model: str) -> int:
    """Bytes of an adapter's vectors."""
    layers, numbers = MODELS[model]
    return layers * numbers * FLOAT32


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The page's tables, by name."""
    return {
        "adapters": adapters_table(),
        "speed": speed_table(Speed(**found["fleets"][0]["speed"])),
        "measured": measured_table(found["beside_measured"]),
        "fleets": fleets_table(found["fleets"]),
        "requests": requests_table(found["store_requests"]),
        "journal": journal_table(found["journal"]),
    }


def adapters_table() -> str:
    def row(model: str) -> list[str]:
        one = bytes_of(model)
        bank = (SLOTS + 1 + ROWS + 1) * one
        host = [count * one for count in ADAPTERS]
        return [
            model,
            f"{one / 1e6:.2f}",
            f"{bank / 1e6:,.0f}",
            f"{SLOTS + HOST_BYTES // one:,}",
            *(f"{each / 1e9:,.2f}" for each in host),
            f"{REVISIONS * host[-1] / 1e9:,.0f}",
        ]

    counts = [f"{count:,} adapters, GB" for count in ADAPTERS]
    most = f"disk of {ADAPTERS[-1]:,}, at most, GB"
    head = ["", "an adapter, MB", f"bank of {SLOTS}, MB", "in memory", *counts, most]
    return table(head, map(row, MODELS))


def speed_table(speed: Speed) -> str:
    parts = (speed.step, speed.token, speed.fill)
    head = ["milliseconds of", "a step", "each token in it", "each slot that is filled"]
    return table(head, [["SmolLM2-135M, two cores", *(f"{1e3 * each:.2f}" for each in parts)]])


def measured_table(found: dict[str, Any]) -> str:
    percents = ("p50", "p95", "p99")
    return table(
        ["load", *(f"{kind}, {p}" for kind in ("measured", "simulated") for p in percents)],
        [
            [
                f"{float(part):.0%}",
                *(f"{each[kind][p]:.0f}" for kind in ("measured", "simulated") for p in percents),
            ]
            for part, each in found.items()
        ],
    )


def fleets_table(found: list[dict[str, Any]]) -> str:
    percents = ("p50", "p95", "p99")
    return table(
        [
            "replicas, routing",
            "adapters",
            "requests/s",
            "TTFT p50",
            "p95",
            "p99",
            "slots filled",
            "read",
            "busiest",
        ],
        [
            [
                f"{each['replicas']}" + (f", {each['routing']}" if each["replicas"] > 1 else ""),
                f"{each['adapters']:,}",
                f"{each['requests_per_second']:,.0f}",
                *(f"{each['ttft_ms'][p]:.0f}" for p in percents),
                f"{each['fills_per_request']:.1%}",
                f"{each['reads_per_request']:.1%}",
                f"{each['busiest_over_mean']:.2f}",
            ]
            for each in found
        ],
    )


def requests_table(found: list[dict[str, Any]]) -> str:
    def dollars(requests: dict[str, float]) -> float:
        return sum(DOLLARS[kind] * count for kind, count in requests.items())

    return table(
        [
            "replicas",
            "reads/s",
            "writes and lists/s",
            "$ a month",
            "reads of a change",
            "its writes and lists",
            "$ for 1,000 changes",
            "it waits, s",
        ],
        [
            [
                str(each["servers"]),
                *(f"{n * each['servers']:,.1f}" for n in _kinds(each["per_server_and_second"])),
                f"{MONTH * each['servers'] * dollars(each['per_server_and_second']):,.0f}",
                *(f"{n:,.0f}" for n in _kinds(each["per_change"])),
                f"{1000 * dollars(each['per_change']):.2f}",
                f"{each['change_seconds']:.1f}",
            ]
            for each in found
        ],
    )


def _kinds(requests: dict[str, float]) -> tuple[float, float]:
    """Reads, and what costs as much as a write."""
    return requests.get("GET", 0.0), requests.get("PUT", 0.0) + requests.get("LIST", 0.0)


def journal_table(found: dict[str, float]) -> str:
    counts = [1_000, 100_000, 1_000_000]
    return table(
        ["changes since the beginning", "journal, MB", "of each start, s"],
        [
            [
                f"{count:,}",
                f"{count * found['bytes_per_event'] / 1e6:,.1f}",
                f"{count * found['microseconds_per_event'] / 1e6:,.2f}",
            ]
            for count in counts
        ],
    )


def with_table(page: str, name: str, text: str) -> str:
    """The page with a table between the two marks of its name."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, _, rest = page.partition(begin)
    return before + begin + text + "\n" + end + rest.partition(end)[2]


if __name__ == "__main__":
    typer.run(main)
