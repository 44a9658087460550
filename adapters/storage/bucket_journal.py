"""A journal in a bucket: one object for each event, named by its number, and segments of many.

    journal/000000000301.jsonl               event 301
    journal/000000000001-000000000300.jsonl  events 1 to 300, once they are many

An event is *created*, never overwritten, so no two can have the same number. Each process that
opens the journal first creates an event "opened". A process that had the journal before wants the
same number for its next event, finds it taken, and so knows that it has lost the journal. That is
why the object of an "opened" event is never deleted; others are, once a segment contains them.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile

from infuse.adapters.errors import Overtaken, StoreLocked, StoreUnreachable
from infuse.adapters.storage.chain import (
    Entry,
    Event,
    chained_line,
    digest_of_line,
    follow,
    readable,
)
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import Replicas

log = logging.getLogger(__name__)

COMPACT_EVERY = 256
"""How many single events are joined into a segment."""
LONGEST = 50_000
"""How many events a segment may have that is still joined with others."""
_PREFIX = "journal"
_KEY = re.compile(rf"{_PREFIX}/(\d{{12}})(?:-(\d{{12}}))?\.jsonl")
_LOOKS = 5
_LOOKS_AMONG_OTHERS = 100
_AT_ONCE = 16
"""How many events are asked for at once, at most."""


@dataclass(frozen=True, slots=True)
class _Span:
    """An object of the journal: the events from `first` to `last`, one line each."""

    first: int
    last: int

    @property
    def key(self) -> str:
        last = "" if self.first == self.last else f"-{self.last:012}"
        return f"{_PREFIX}/{self.first:012}{last}.jsonl"

    @property
    def count(self) -> int:
        return self.last - self.first + 1


class BucketJournal:
    """Owns the objects under journal/, until another process opens them. One thread at a time
    reads, appends or settles; another thread may compact."""

    def __init__(self, objects: Objects, writer: str) -> None:
        """`writer`: an id that no other process has."""
        self._objects = objects
        self._writer = writer
        self._last = 0
        """The number of the last event."""
        self._digest = ""
        """Of all events up to the last."""
        self._compacted = 0
        """The number of the last event that is in a segment."""
        self._in_doubt = False
        self.epoch = 0
        """The number of the last event "opened": later processes have higher ones."""

    @property
    def in_doubt(self) -> bool:
        """Whether an append failed whose event may be in the journal all the same."""
        return self._in_doubt

    @property
    def is_long(self) -> bool:
        return self._last - self._compacted >= COMPACT_EVERY

    @property
    def last(self) -> int:
        """The number of the last event that was read or appended."""
        return self._last

    def read(self) -> list[Event]:
        """Return every event, oldest first. No process that opened the journal before can append
        any more."""
        return readable(self._open(_LOOKS), self._objects.url)

    def lines(self) -> list[bytes]:
        """Return every event as it was written, without opening the journal. Events that are gone
        are empty."""
        lines = self._lines()
        return [lines.get(number, b"") for number in range(1, self._last + 1)]

    def _open(self, looks: int) -> list[Entry]:
        """Create an event "opened"; return all events before it."""
        for _ in range(looks):
            entries = list(follow(self.lines()))
            self._digest = entries[-1].digest if entries else ""
            opened = self._line("opened", {})
            ours = self._objects.create(self._key(1), opened) or self._now_at_next() == opened
            mine = _Span(self._last + 1, self._last + 1)
            # A listing is not atomic: events that it missed are in a segment by now.
            if ours and not any(s.last >= mine.last and s != mine for s in self._spans()):
                self._take_up(opened)
                self.epoch = self._last
                return entries
        raise StoreLocked(f"other servers write to {self._objects.url}")

    def append(self, event: Mapping[str, object]) -> None:
        """Raises StoreLocked where another process has opened the journal since."""
        assert not self._in_doubt, "settle comes first"
        line = self._line(str(event["event"]), event)
        self._in_doubt = True
        if not self._objects.create(self._key(1), line) and self._now_at_next() != line:
            raise self._taken()
        self._in_doubt = False
        self._take_up(line)

    def settle(self) -> Sequence[Event]:
        """Return the event that was in doubt, if it is in the journal; else use up its number."""
        if not self._in_doubt:
            return ()
        event, line = {}, self._line("void", {})
        if not self._objects.create(self._key(1), line):
            line = self._now_at_next()
            event = json.loads(line)
            if event.get("writer") != self._writer:
                raise self._taken()
        happened = event and event["event"] != "void"
        if not happened and self._objects.get(self._key(2)) is not None:
            # It is in the journal: a process that opened it later has put it into a segment.
            raise self._taken()
        self._in_doubt = False
        self._take_up(line)
        return (event,) if happened else ()

    def compact(self, last: int | None = None) -> None:
        """Write the last events, and segments that are not longer than they, as one segment.
        `last`: the number of the last one; default: of all.

        This is safe at any moment and beside any other process, since it copies what is there.
        Later events keep their objects: a process that does not know whether its event was written
        looks for the object.
        """
        last = self._last if last is None else last
        spans = [span for span in self._spans() if span.last <= last]
        tail: list[_Span] = []
        for span in reversed(_cover(spans)):
            longest = min(2 * _count(tail), LONGEST)
            if tail and (span.last + 1 != tail[0].first or span.count > longest):
                break
            tail.insert(0, span)
        if len(tail) < 2:
            # Another process has joined them.
            self._compacted = max((s.last for s in tail if s.count > 1), default=self._compacted)
            return
        texts = self._objects.get_all([span.key for span in tail])
        lines = _numbered(zip(tail, texts, strict=True))
        segment = _Span(tail[0].first, tail[-1].last)
        if len(lines) < segment.count:
            return
        text = b"".join(lines[number] + b"\n" for number in sorted(lines))
        self._objects.create(segment.key, text)
        self._objects.delete(
            span.key
            for span in spans
            if span != segment
            and segment.first <= span.first
            and span.last <= segment.last
            and not (span.count == 1 and _is_fence(lines[span.first]))
        )
        self._compacted = segment.last

    def _lines(self) -> dict[int, bytes]:
        """Return all events by number.

        Another process may compact meanwhile: then the next look finds what is missing. Events that
        stay missing were removed from outside; all others are read.
        """
        for _ in range(_LOOKS):
            cover = _cover(self._spans())
            texts = self._objects.get_all([span.key for span in cover])
            lines = _numbered(zip(cover, texts, strict=True))
            self._last = cover[-1].last if cover else 0
            self._compacted = max((span.last for span in cover if span.count > 1), default=0)
            if len(lines) == self._last:
                break
        else:
            gone = self._last - len(lines)
            log.warning("%d events are gone from %s.", gone, self._objects.url)
        return lines

    def _spans(self) -> list[_Span]:
        found = map(_KEY.fullmatch, self._objects.list(_PREFIX))
        return [_Span(int(key[1]), int(key[2] or key[1])) for key in found if key is not None]

    def _key(self, further: int) -> str:
        number = self._last + further
        return _Span(number, number).key

    def _now_at_next(self) -> bytes:
        found = self._objects.get(self._key(1))
        if found is None:
            # The bucket got two creations at once, and has made neither, or not yet.
            raise StoreUnreachable(f"The bucket {self._objects.url} refused a write; try again.")
        return found

    def _line(self, event: str, values: Mapping[str, object]) -> bytes:
        """Return the line of an event, if it is the next one."""
        now = datetime.now(UTC).isoformat()
        whole = {"time": now, "event": event, **values, "writer": self._writer}
        return chained_line(whole, self._digest)

    def _take_up(self, line: bytes) -> None:
        """Go on after a line of this process."""
        self._last += 1
        self._digest = digest_of_line(line)

    def _taken(self) -> StoreLocked:
        return StoreLocked(
            f"another server has taken over the adapters in {self._objects.url}; this one changes "
            "none any more"
        )


def segment_of(count: int) -> str:
    """Return the key of an object with the first `count` events."""
    return _Span(1, count).key


class SharedBucketJournal(BucketJournal):
    """A journal that several processes append to, each after what it has read of the others.

    A process that shows itself in `replicas` reads single objects: none is joined into a segment
    before that process has read it. A process that was away opens the journal again.
    """

    def __init__(self, objects: Objects, writer: str, replicas: Replicas) -> None:
        super().__init__(objects, writer)
        self._replicas = replicas

    def read(self) -> list[Event]:
        """Return every event that was not returned before, oldest first."""
        before = self._last, self._digest
        try:
            entries = self._open(_LOOKS_AMONG_OTHERS)
        except BaseException:
            self._last, self._digest = before
            raise
        self._in_doubt = False
        return readable(entries[before[0] :], self._objects.url)

    def append(self, event: Mapping[str, object]) -> None:
        """Raises Overtaken where another process has appended an event that was not read here, and
        StoreUnreachable where this process was away."""
        line = self._line(str(event["event"]), event)
        self._in_doubt = True
        is_ours = self._objects.create(self._key(1), line) or self._now_at_next() == line
        # While a process is away, others may join the event of this number into a segment.
        self._replicas.check()
        self._in_doubt = False
        if not is_ours:
            raise Overtaken(f"Another server has changed {self._objects.url} first.")
        self._take_up(line)

    def settle(self) -> list[Event]:
        """Return every event that was not returned before, oldest first. Raises StoreUnreachable
        where this process was away."""
        lines: list[bytes] = []
        at_once = 1
        while True:
            first = len(lines) + 1
            found = self._objects.get_all([self._key(first + i) for i in range(at_once)])
            whole = [text for text in takewhile(lambda text: text is not None, found) if text]
            lines += whole
            if len(whole) < at_once:
                break
            at_once = min(2 * at_once, _AT_ONCE)
        self._replicas.check()
        entries = list(follow(lines, self._last, self._digest))
        if entries:
            self._in_doubt = False
            self._last, self._digest = entries[-1].number, entries[-1].digest
        opened = [each.number for each in entries if _opens(each.event)]
        self.epoch = max(opened, default=self.epoch)
        return readable(entries, self._objects.url)


def _cover(spans: Iterable[_Span]) -> list[_Span]:
    """Return spans that together contain all events, each as wide as possible."""
    cover: list[_Span] = []
    for span in sorted(spans, key=lambda span: (span.first, -span.last)):
        if not cover or span.last > cover[-1].last:
            cover.append(span)
    return cover


def _count(spans: Sequence[_Span]) -> int:
    return sum(span.count for span in spans)


def _numbered(objects: Iterable[tuple[_Span, bytes | None]]) -> dict[int, bytes]:
    lines: dict[int, bytes] = {}
    for span, text in objects:
        if text is not None:
            lines.update(zip(range(span.first, span.last + 1), text.split(b"\n"), strict=False))
    return lines


def _is_fence(line: bytes) -> bool:
    [entry] = follow([line])
    return _opens(entry.event)


def _opens(event: Event | None) -> bool:
    return event is not None and event.get("event") == "opened"
