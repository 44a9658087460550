"""What a tenant could find out by time: the same requests for what another has and for what nobody
has, in pairs, many times. `docs/leaks.md` is written from it.

Nothing here judges how fast anything is: the two requests of a pair follow each other at once, in
an order that is drawn, and only their difference counts. What must be equal to the byte, and that
nothing is looked up, is in `test_scopes.py`.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median

import httpx
import pytest

from benchmarks.machine import machine
from benchmarks.statistics import bounds_of_median
from tests.api.test_scopes import (
    ABSENT_MERGE,
    ADAPTERS,
    COMPLETIONS,
    MERGES,
    NOBODYS,
    ROUTES,
    THEIRS,
    House,
    body,
)
from tests.api.test_scopes import house as house

PAGE = Path(__file__).parents[2] / "docs" / "leaks.md"
PAIRS = 500
MOST, MOST_OF_TIME = 0.6, 0.05
"""The share of the pairs in which one of the two may be the slower; and what the median difference
may be, as a part of the time that they take."""
PROMPT_TOKENS, VOCABULARY = 200, 200
ABOUT = f"""# What a tenant finds out by time

Written by `make test-full` (`tests/api/test_leaks.py`); not by hand.

A tenant asks for what another has and for what nobody has: {PAIRS:,} pairs for each route, in
every way in which the route can name an adapter or a merge, and for prompts that the other has just
sent. The two requests of a pair follow each other at once, in an order that is drawn; what else
the machine does meets both alike. They are told apart if one of them is the slower in more than
{MOST:.0%} of the pairs, or if all of the 95% interval of the median difference is beyond
{MOST_OF_TIME:.0%} of the time that they take. The last rows are the same measurement where the two
must be told apart: by a key that may see both, and by the tenant that sent the prompt.

"""
HEAD = """| requests | pairs | median, ms | difference, % (95%) | other's is slower | told apart |
|---|---|---|---|---|---|
"""

Pair = tuple[Callable[[], object], Callable[[], object]]
"""A request for what the other tenant has, and the same for what nobody has."""


@dataclass(frozen=True)
class Told:
    """What the pairs of one kind say."""

    name: str
    must_tell: bool
    pairs: list[tuple[float, float]]
    """Seconds of each."""

    @property
    def slower(self) -> float:
        """The share of the pairs in which the request for what is another's took longer."""
        return sum((a > b) + (a == b) / 2 for a, b in self.pairs) / len(self.pairs)

    @property
    def median(self) -> float:
        return median(b for _, b in self.pairs)

    @property
    def differences(self) -> tuple[float, float, float]:
        """The median difference and its bounds, as parts of the time."""
        values = [a - b for a, b in self.pairs]
        bounds = bounds_of_median(values)
        assert bounds is not None
        return tuple(each / self.median for each in (median(values), bounds.lower, bounds.upper))  # type: ignore[return-value]

    @property
    def tells(self) -> bool:
        _, lower, upper = self.differences
        by_time = lower > MOST_OF_TIME or upper < -MOST_OF_TIME
        return max(self.slower, 1 - self.slower) > MOST or by_time

    @property
    def row(self) -> str:
        difference, lower, upper = (f"{100 * each:+.1f}" for each in self.differences)
        return (
            f"| {self.name} | {len(self.pairs)} | {1e3 * self.median:.2f} "
            f"| {difference} ({lower} to {upper}) | {self.slower:.1%} "
            f"| {'yes' if self.tells else 'no'} |"
        )


def told_by(name: str, pairs: Iterable[Pair], must_tell: bool = False) -> Told:
    random, times = Random(name), []
    for theirs, nobodys in pairs:
        first = random.random() < 0.5
        pair = [_seconds(each) for each in ((theirs, nobodys) if first else (nobodys, theirs))]
        times.append((pair[0], pair[1]) if first else (pair[1], pair[0]))
    return Told(name, must_tell, times)


def _seconds(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


def naming(house: House, client: httpx.Client, method: str, path: str) -> Iterator[Pair]:
    """Pairs of requests that name an adapter or a merge, in all ways in turn."""
    theirs, nobodys = THEIRS, NOBODYS
    if path.startswith(f"{MERGES}/"):
        theirs, nobodys = house.merges["globex admin"], ABSENT_MERGE
    probes = ROUTES[method, path]
    for number in range(PAIRS):
        probe = probes[number % len(probes)]
        yield (
            lambda probe=probe: client.request(method, **probe(theirs)),  # type: ignore[misc]
            lambda probe=probe: client.request(method, **probe(nobodys)),  # type: ignore[misc]
        )


def prompting(house: House, caller: str) -> Iterator[Pair]:
    """Pairs of requests with a prompt that globex has just sent, and with one that nobody has."""
    random = Random(caller)
    with house.by("globex app") as globex, house.by(caller) as client:
        for _ in range(PAIRS):
            theirs, nobodys = (
                body(
                    model="tiny",
                    prompt=[random.randrange(5, VOCABULARY) for _ in range(PROMPT_TOKENS)],
                )
                for _ in range(2)
            )
            globex.post(COMPLETIONS, **theirs).raise_for_status()
            yield (
                lambda asked=theirs: client.post(COMPLETIONS, **asked),  # type: ignore[misc]
                lambda asked=nobodys: client.post(COMPLETIONS, **asked),  # type: ignore[misc]
            )


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_time_tells_a_tenant_nothing_of_what_another_has(house: House) -> None:
    found = []
    with house.by("acme admin") as acme, house.by("ops") as ops:
        for method, path in ROUTES:
            if ROUTES[method, path]:
                found.append(told_by(f"{method} {path}", naming(house, acme, method, path)))
        found.append(told_by("a prompt of another", prompting(house, "acme app")))
        seen = naming(house, ops, "GET", f"{ADAPTERS}/{{name}}")
        found.append(told_by("by a key that may see both", seen, must_tell=True))
        found.append(told_by("a prompt of one's own", prompting(house, "globex app"), True))
    PAGE.write_text(page_of(found))

    assert {each.name for each in found if each.tells} == {
        each.name for each in found if each.must_tell
    }


def page_of(found: list[Told]) -> str:
    where = machine()
    rows = "\n".join(each.row for each in found)
    kind = ", ".join(where["vector"])
    return f"{ABOUT}Measured on {where['cores']} cores ({kind}).\n\n{HEAD}{rows}\n"
