"""The chain of a journal: each event has the digest of everything before it in its field "chain".

The digest of a journal goes by its last line, and is empty for an empty journal:

    a chained event          SHA-256 of the line
    an event without chain   SHA-256 of the digest before it and the line

So a change of any line, or of their order, leaves an event whose chain is not the digest before it.
Releases before the chain wrote events without it; the first chained one stands for all of them.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)

Event = dict[str, Any]
_FIELD = "chain"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of a journal."""

    number: int
    event: Event | None
    """None where the line is damaged."""
    before: str
    """The digest of the journal before this line."""
    digest: str
    """The digest of the journal up to this line."""

    @property
    def is_chained(self) -> bool:
        return self.event is not None and _FIELD in self.event

    @property
    def is_broken(self) -> bool:
        """Whether the line was written after something else than what is before it."""
        return self.event is not None and self.event.get(_FIELD, self.before) != self.before


def follow(lines: Iterable[bytes], number: int = 0, digest: str = "") -> Iterator[Entry]:
    """Read lines that come after `number` others, whose digest is `digest`."""
    for number, line in enumerate(lines, start=number + 1):  # noqa: B020
        event, before = _parsed(line), digest
        is_chained = event is not None and _FIELD in event
        digest = digest_of_line(line if is_chained else before.encode() + line)
        yield Entry(number, event, before, digest)


def readable(entries: Iterable[Entry], where: str) -> list[Event]:
    """Return the events that change an adapter. What is wrong with the others, or with the chain,
    is logged, and keeps no adapter from being served."""
    events, broken = [], []
    for entry in entries:
        if entry.event is None:
            log.warning("Event %d is damaged and skipped (%s).", entry.number, where)
        elif "name" in entry.event:
            events.append(entry.event)
        if entry.is_broken:
            broken.append(entry.number)
    if broken:
        log.error(
            "The journal of %s was changed from outside: %d of its events do not follow the one "
            "before, first event %d. `infuse audit verify` tells more.",
            *(where, len(broken), broken[0]),
        )
    return events


def chained_line(event: Mapping[str, object], digest: str) -> bytes:
    """Return the line of an event that comes after a journal of this digest."""
    whole = {**event, _FIELD: digest}
    return json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()


def digest_of_line(line: bytes) -> str:
    """Return the digest of a journal that ends with a chained line."""
    return hashlib.sha256(line).hexdigest()


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line.decode())
        if b"\\u" in line:
            # Half a character, which no file, key or answer can have.
            json.dumps(event, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None
