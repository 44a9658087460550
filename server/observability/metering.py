"""Counts what each key uses of each adapter, in a file that outlives the server."""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

log = logging.getLogger(__name__)

HOUR = 3600
"""Seconds. What is used within an hour is one row for each key and adapter."""
_KEPT_HOURS = 400 * 24
"""Older rows are removed at the next start."""
_BUSY_SECONDS = 5.0
"""Seconds that a write waits for another server with the same file."""
_CLOSING_SECONDS = 5.0
"""Seconds that the last write has at the server's end."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS usage (
    hour INTEGER,
    key TEXT,
    adapter TEXT,
    requests INTEGER,
    prompt_tokens INTEGER,
    cached_tokens INTEGER,
    completion_tokens INTEGER,
    microseconds INTEGER,
    PRIMARY KEY (hour, key, adapter)
) WITHOUT ROWID
"""
_ADD = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
    requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    cached_tokens = cached_tokens + excluded.cached_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens,
    microseconds = microseconds + excluded.microseconds
"""
_SELECT = """
SELECT strftime(?, hour * 3600, 'unixepoch') AS start, key, adapter,
    sum(requests), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens),
    sum(microseconds)
FROM usage
WHERE hour >= ? AND hour < ? AND key = ifnull(?, key) AND adapter = ifnull(?, adapter)
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3 LIMIT ?
"""


class BadUsageFile(Exception):
    """The file cannot be used."""


@dataclass(frozen=True, slots=True)
class Amount:
    """What some requests have used."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    microseconds: int = 0
    """For which their choices ran, each for itself."""

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which rows are asked for, and how hours are taken together."""

    first_hour: int
    """Hours since 1970."""
    end_hour: int
    """The first one that is not asked for."""
    period: str
    """How `strftime` writes the beginning of the period that an hour belongs to."""
    key: str | None = None
    adapter: str | None = None
    limit: int


@dataclass(frozen=True, slots=True)
class Row:
    """What a key has used of an adapter within a period."""

    start: str
    key: str
    adapter: str
    amount: Amount


_Place = tuple[int, str, str]
"""Hour, key and adapter."""


class Meter:
    """Owns the file. Every method may be called from any thread; servers of one machine may share
    a file."""

    def __init__(self, folder: Path, now: Callable[[], float] = time.time) -> None:
        """Raises BadUsageFile."""
        self._path = folder / "usage.sqlite3"
        self._now = now
        self._lock = threading.Lock()
        """Guards the two attributes below."""
        self._unwritten: dict[_Place, Amount] = {}
        self._next_write: Future[None] | None = None
        """The write that has not begun."""
        self._writer = ThreadPoolExecutor(1, "metering")
        self._problem = ""
        """Why the latest write failed. Empty: it did not."""
        try:
            self._connection: sqlite3.Connection | None = self._connect()
            with self._connection:
                oldest = int(now()) // HOUR - _KEPT_HOURS
                self._connection.execute("DELETE FROM usage WHERE hour < ?", (oldest,))
        except (OSError, sqlite3.Error) as error:
            raise BadUsageFile(
                f"{self._path} cannot be used ({error}): move it away, or set --usage-dir"
            ) from None

    def _connect(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._path, _BUSY_SECONDS, check_same_thread=False)
        try:
            # A commit is handed to the system, and needs no sync: it outlives the process.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    def add(self, key: str, adapter: str, amount: Amount) -> Future[None]:
        """Count an amount as used now. The future is done once it is written, or could not be."""
        place = int(self._now()) // HOUR, key, adapter
        with self._lock:
            self._keep({place: amount})
            if self._next_write is None:
                self._next_write = self._writer.submit(self._write)
            return self._next_write

    def _keep(self, amounts: dict[_Place, Amount]) -> None:
        for place, amount in amounts.items():
            self._unwritten[place] = self._unwritten.get(place, Amount()) + amount

    def _write(self) -> None:
        """Write what is unwritten. What cannot be written is tried again with the next amount."""
        with self._lock:
            amounts, self._unwritten, self._next_write = self._unwritten, {}, None
        problem = ""
        try:
            self._connection = self._connection or self._connect()
            with self._connection:
                rows = [(*place, *astuple(amount)) for place, amount in amounts.items()]
                self._connection.executemany(_ADD, rows)
        except (OSError, sqlite3.Error) as error:
            problem = str(error)
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            with self._lock:
                self._keep(amounts)
        if problem and problem != self._problem:
            log.error("Usage is kept in memory alone, as %s fails: %s", self._path, problem)
        self._problem = problem

    @property
    def unwritten(self) -> int:
        """How many requests have been counted in memory alone."""
        with self._lock:
            return sum(amount.requests for amount in self._unwritten.values())

    def rows(self, query: Query) -> list[Row]:
        """What has been written, in order of time, key and adapter. Raises BadUsageFile."""
        given = (query.period, query.first_hour, query.end_hour, query.key, query.adapter)
        try:
            with closing(sqlite3.connect(self._path, _BUSY_SECONDS)) as connection:
                found: Iterable[tuple[str, str, str, int, int, int, int, int]]
                found = connection.execute(_SELECT, (*given, query.limit))
                return [Row(start, key, adapter, Amount(*n)) for start, key, adapter, *n in found]
        except sqlite3.Error as error:
            raise BadUsageFile(str(error)) from error

    def close(self) -> None:
        """Write what is left, unless the disk does not answer."""
        last = self._writer.submit(self._write)
        self._writer.shutdown(wait=False)
        try:
            last.result(_CLOSING_SECONDS)
        except TimeoutError:
            return
        if self._connection is not None:
            self._connection.close()
