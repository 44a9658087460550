"""What is compared: each engine in a process of its own, behind one interface.

Only the standard library is imported here: a peer's environment has none of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


class EngineFailed(Exception):
    """An engine did not start, or failed in a round. The run goes on without it."""


@dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    """Token ids."""
    tokens_out: int
    """Exactly so many: end tokens are passed over. Greedy."""
    adapter: str | None = None
    """None: the base."""
    at: float = 0.0
    """When it arrives, in seconds after the round's beginning."""


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    arrived: float
    """Seconds after the round's beginning, as all times here."""
    last: float
    """The last token's time."""
    first: float | None = None
    """The first token's; None where the engine does not say."""


@dataclass(frozen=True, slots=True)
class Round:
    began: float
    """By `time.perf_counter`, which is one for all processes of a machine."""
    seconds: float
    """From then to its last token."""
    answers: list[Answer] = field(default_factory=list)
    """In the order of the requests."""


class Engine(Protocol):
    """Starts once, answers any number of rounds, and costs nothing in between."""

    name: str

    @property
    def group(self) -> int:
        """The process group that all of it runs in."""

    def start(self) -> None:
        """Raises EngineFailed."""

    def run(self, requests: Sequence[Request], in_flight: int | None = None) -> Round:
        """Answer all requests, each from its arrival on, at most `in_flight` at once.

        Raises EngineFailed.
        """

    def stop(self) -> None: ...
