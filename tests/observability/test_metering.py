"""The meter: amounts by hour, key and adapter, in a file that outlives what goes wrong."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infuse.server.observability.metering import HOUR, Amount, BadUsageFile, Meter, Query

ONE = Amount(
    requests=1, prompt_tokens=20, cached_tokens=8, completion_tokens=4, microseconds=1_500_000
)
FILE = "usage.sqlite3"
DAYS = "%Y-%m-%d"
BROKEN = "CREATE TRIGGER broken BEFORE INSERT ON usage BEGIN SELECT RAISE(FAIL, 'broken'); END"


class Clock:
    hours = 490_000.0

    def __call__(self) -> float:
        return self.hours * HOUR


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(tmp_path: Path, clock: Clock) -> Iterator[Meter]:
    meter = Meter(tmp_path, clock)
    yield meter
    meter.close()


def found(meter: Meter, period: str = DAYS) -> list[tuple[str, str, str, int]]:
    query = Query(first_hour=0, end_hour=1_000_000, period=period, limit=1000)
    return [(row.start, row.key, row.adapter, row.amount.requests) for row in meter.rows(query)]


def write(meter: Meter, key: str = "app", adapter: str = "a") -> None:
    meter.add(key, adapter, ONE).result(30)


def test_amounts_of_one_hour_key_and_adapter_are_added(meter: Meter) -> None:
    for _ in range(3):
        write(meter)

    query = Query(first_hour=0, end_hour=1_000_000, period=DAYS, limit=10)
    [row] = meter.rows(query)
    assert row.amount == ONE + ONE + ONE
    assert row.amount.microseconds == 4_500_000


def test_an_hour_belongs_to_the_time_at_which_it_was_used(meter: Meter, clock: Clock) -> None:
    write(meter)
    clock.hours += 24
    write(meter)
    write(meter)

    assert found(meter) == [("2025-11-24", "app", "a", 1), ("2025-11-25", "app", "a", 2)]
    assert found(meter, "%Y-%m") == [("2025-11", "app", "a", 3)]
    query = Query(first_hour=490_001, end_hour=490_025, period=DAYS, limit=10)
    assert [row.amount.requests for row in meter.rows(query)] == [2]


def test_what_was_written_is_there_after_a_restart_and_grows(tmp_path: Path, clock: Clock) -> None:
    for _ in range(2):
        meter = Meter(tmp_path, clock)
        write(meter)
        meter.close()
    meter = Meter(tmp_path, clock)

    assert found(meter) == [("2025-11-24", "app", "a", 2)]
    meter.close()


def test_close_writes_what_is_left(tmp_path: Path, clock: Clock) -> None:
    meter = Meter(tmp_path, clock)
    for _ in range(100):
        meter.add("app", "a", ONE)
    meter.close()
    again = Meter(tmp_path, clock)

    assert found(again) == [("2025-11-24", "app", "a", 100)]
    again.close()


def test_servers_of_one_machine_share_a_file(tmp_path: Path, clock: Clock, meter: Meter) -> None:
    other = Meter(tmp_path, clock)
    written = [each.add("app", "a", ONE) for _ in range(50) for each in (meter, other)]
    for each in written:
        each.result(30)

    assert found(meter) == found(other) == [("2025-11-24", "app", "a", 100)]
    other.close()


def test_what_cannot_be_written_is_kept_and_written_with_what_comes_next(
    tmp_path: Path, meter: Meter, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute(BROKEN)
        write(meter)
        write(meter)
        assert meter.unwritten == 2
        other.execute("DROP TRIGGER broken")
    write(meter)

    assert meter.unwritten == 0
    assert found(meter) == [("2025-11-24", "app", "a", 3)]
    assert caplog.text.count("Usage is kept in memory alone") == 1, "said once"


@pytest.mark.fault(
    "disk",
    "The usage's file hangs",
    by="a lock of another process's connection",
    promise="Nobody who is counted waits; all of it is written afterwards.",
)
def test_a_file_that_hangs_holds_up_nobody_who_adds(tmp_path: Path, meter: Meter) -> None:
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        waiting = [meter.add("app", "a", ONE) for _ in range(10)]
        assert not waiting[-1].done()
        other.execute("COMMIT")
    waiting[-1].result(30)

    assert found(meter) == [("2025-11-24", "app", "a", 10)]


@pytest.mark.fault(
    "configuration",
    "The usage's file is something else",
    by="the file",
    promise="The start is refused with what to do; the file stays as it is.",
)
def test_a_file_that_is_none_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"something else" * 1000)

    with pytest.raises(BadUsageFile, match="move it away, or set --usage-dir"):
        Meter(tmp_path)

    assert (tmp_path / FILE).read_bytes() == b"something else" * 1000


def test_usage_is_kept_for_400_days(tmp_path: Path, clock: Clock) -> None:
    meter = Meter(tmp_path, clock)
    write(meter)
    clock.hours += 24
    write(meter)
    meter.close()
    clock.hours += 400 * 24
    meter = Meter(tmp_path, clock)

    assert found(meter) == [("2025-11-25", "app", "a", 1)]
    meter.close()
