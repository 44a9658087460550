"""What is known of an answer at its end: its tokens, and when each of its choices ran."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from infuse.server.engine.request import FinishReason


class Stage(NamedTuple):
    """Times are by `time.perf_counter`."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A choice that has ended. Times are by `time.perf_counter`."""

    number: int
    lacked_slot: float | None
    """When it was its turn, and there was no slot for its adapter. None: there was one."""
    started: float | None
    """When it first ran. None: it ended before its first output."""
    first_token: float | None
    ended: float
    finish: FinishReason

    def stages(self, submitted: float) -> Iterator[Stage]:
        """Where its time went, from its submission to its end without a gap."""
        times = {
            "queue": submitted,
            "slot": self.lacked_slot,
            "prefill": self.started,
            "decode": self.first_token,
        }
        begun = [(name, at) for name, at in times.items() if at is not None]
        for (name, begin), (_, end) in pairwise([*begun, ("", self.ended)]):
            yield Stage(name, begin, end)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answer of one request, however it ended."""

    id: str
    model: str
    """As the request named it."""
    adapter: str | None
    """`name@revision`, how several adapters are mixed, or None for the base model."""
    fingerprint: str
    """The adapter, or the base model's name."""
    submitted: float
    """When its choices were submitted to the engine, by `time.perf_counter`."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    choices: tuple[Choice, ...]
    """In the order in which they ended."""

    @property
    def ended(self) -> float:
        return max((each.ended for each in self.choices), default=self.submitted)

    @property
    def queue_seconds(self) -> float | None:
        """Until the first choice ran; None where none is known to have."""
        return self._seconds_until([each.started for each in self.choices])

    @property
    def first_token_seconds(self) -> float | None:
        """Until the first token of any choice; None where there is none."""
        return self._seconds_until([each.first_token for each in self.choices])

    @property
    def running_seconds(self) -> float:
        """For which its choices ran, each for itself."""
        return sum(each.ended - each.started for each in self.choices if each.started is not None)

    @property
    def finish_reasons(self) -> list[str]:
        """Why its choices ended, each reason once."""
        return sorted({each.finish.value for each in self.choices})

    def _seconds_until(self, times: list[float | None]) -> float | None:
        known = [each for each in times if each is not None]
        return round(min(known) - self.submitted, 4) if known else None
