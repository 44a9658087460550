"""docs/soak.md: what a server went through in an hour of twice its load, and what it held."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.machine import machine
from tests.api.soak import TENANTS, Soak
from tests.api.soak_watch import KINDS, Held, Trend

PAGE = Path(__file__).parents[2] / "docs" / "soak.md"
ABOUT = """# An hour of twice the load

Written by `make test-full`; not by hand.

A server of a tiny model, in a process of its own, gets twice as many requests as it serves, from
three tenants that wait for no answer before they send more: completions, chats, mixtures and
streams, some of which are left. Beside them adapters are added, replaced, combined, merged,
disabled and deleted, uploads are abandoned, and malformed requests come. Every greedy answer is
compared with PEFT's of the revision that its header names, every answer with the OpenAPI document.
Everything is scarce: 8 batch rows, 6 slots, 2,048 tokens of cache, 32 places in the queue.
"""


@dataclass(frozen=True)
class Told:
    """How a soak went. All in seconds and bytes."""

    soak: Soak
    start: Held
    warm: Sequence[Held]
    """What was held again and again after the warm-up."""
    rested: Held
    """What is held when everything is deleted and nothing runs."""
    server_seconds: float
    """What the server has computed under the load."""
    client_seconds: float

    @cached_property
    def trends(self) -> dict[str, Trend]:
        return {each.name: Trend.of(self.warm, each.name) for each in KINDS}

    @property
    def growing(self) -> list[str]:
        """The kinds that grow by more than their noise, and by more than a hundredth."""
        return [
            f"{name}: {trend}"
            for name, trend in self.trends.items()
            if trend.grown > max(trend.noise, getattr(self.warm[0], name) / 100)
        ]


def page_of(told: Told) -> str:
    return "\n".join(_lines(told)) + "\n"


def _lines(told: Told) -> Iterator[str]:
    where, soak = machine(), told.soak
    minutes = (told.warm[-1].seconds - told.start.seconds) / 60
    answers = sum((soak.asked[each] for each in TENANTS), Counter())
    yield ABOUT
    yield "| | |"
    yield "|---|---|"
    yield f"| date | {where['date']} |"
    yield f"| commit | {where['commit']} |"
    yield f"| machine | {where['cpu']}, {where['cores']} cores |"
    yield f"| time under load | {minutes:.0f} minutes |"
    yield f"| requests | {answers.total()}, {answers.total() / minutes / 60:.0f} a second |"
    yield f"| compared with PEFT | {soak.book.answers} answers, 0 wrong |"
    yield f"| malformed | {soak.malformed.total()} requests: {_counts(soak.malformed)} |"
    yield f"| changes | {_counts(soak.changes)} |"
    yield f"| undocumented answers | {len(soak.strays)} |"
    yield f"| processor | server {told.server_seconds:.0f} s, clients {told.client_seconds:.0f} s |"
    yield ""
    yield "## What each tenant got"
    yield ""
    yield "Statuses of generation requests, and of changes and of what was looked at. *left*: the"
    yield "client went away after the first event of a stream."
    yield ""
    yield "| tenant | its key's limits | generation | changes |"
    yield "|---|---|---|---|"
    for tenant, limits in TENANTS.items():
        shown = ", ".join(f"{name} {value}" for name, value in limits.items())
        asked, others = soak.asked[tenant], soak.others[tenant]
        yield f"| {tenant} | {shown} | {_counts(asked)} | {_counts(others)} |"
    yield ""
    yield "## What the server held"
    yield ""
    yield f"Looked at {len(told.warm)} times after the warm-up. *Slope*: Theil and Sen's. *Noise*:"
    yield "between what nine of ten looks differ from it. *At rest*: everything is deleted."
    yield ""
    yield "| | start | warm | end | at rest | slope an hour | noise |"
    yield "|---|---|---|---|---|---|---|"
    moments = [told.start, told.warm[0], told.warm[-1], told.rested]
    for each in KINDS:
        unit, trend = each.metadata["unit"], told.trends[each.name]
        digits = 1 if unit > 1 else 0
        at = " | ".join(f"{getattr(held, each.name) / unit:,.{digits}f}" for held in moments)
        slope, noise = trend.per_hour / unit, trend.noise / unit
        yield f"| {each.metadata['shown']} | {at} | {slope:+.2f} | {noise:.2f} |"
    yield ""
    yield "At the end 0 batch rows, 0 blocks, 0 slots and 0 leases were in use, and 0 processes, 0"
    yield "staged uploads, 0 contents and 0 temporary files were left."


def _counts(counts: "Counter[str] | Counter[int]") -> str:
    return ", ".join(f"{name}: {count}" for name, count in sorted(counts.items(), key=str))
