"""What one durable change costs in a journal of lines and in SQLite: `python -m
benchmarks.journal_formats FOLDER`.

Each way records changes of 361 bytes, an event's usual size, and syncs each. Then a process that
writes without a pause is killed, several times, and what it had acknowledged is looked for.
"""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

EVENT = json.dumps({"text": "x" * 349})
Write = Callable[[], None]


def lines(folder: Path) -> Write:
    file = os.open(folder / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write() -> None:
        os.write(file, f"{EVENT}\n".encode())
        os.fdatasync(file)

    return write


def sqlite(journal: str) -> Callable[[Path], Write]:
    def opened(folder: Path) -> Write:
        database = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        database.execute(f"PRAGMA journal_mode={journal}")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, text)")

        def write() -> None:
            database.execute("INSERT INTO events (text) VALUES (?)", (EVENT,))

        return write

    return opened


def found_in_lines(folder: Path) -> int:
    whole, _, _ = (folder / "journal.jsonl").read_text().rpartition("\n")
    return len(whole.splitlines())


def found_in_sqlite(folder: Path) -> int:
    database = sqlite3.connect(folder / "journal.sqlite")
    (count,) = database.execute("SELECT count(*) FROM events").fetchone()
    return int(count)


WAYS = {
    "a journal of lines": (lines, found_in_lines),
    "SQLite, write-ahead log": (sqlite("WAL"), found_in_sqlite),
    "SQLite, rollback journal": (sqlite("DELETE"), found_in_sqlite),
}


def main(
    folder: Annotated[Path, typer.Argument(help="An empty folder on the disk to measure.")],
    writes: Annotated[int, typer.Option(help="Of each way.")] = 500,
    kills: Annotated[int, typer.Option(help="Of each way.")] = 20,
) -> None:
    for number, (way, (opened, found)) in enumerate(WAYS.items()):
        place = folder / str(number)
        place.mkdir()
        write, took = opened(place), []
        for _ in range(writes):
            began = time.perf_counter()
            write()
            took.append(time.perf_counter() - began)
        lost = 0
        for _ in range(kills):
            before = found(place)
            lost += before + killed(way, place) > found(place)
        typer.echo(
            f"{way}: {1000 * median(took):.2f} ms a change, {lost} of {kills} kills lost one"
        )


def killed(way: str, place: Path) -> int:
    """How many changes a process acknowledged before it was killed in the midst of them."""
    command = [sys.executable, "-m", "benchmarks.journal_formats", "--forever", way, str(place)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(20):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        return 20 + len(process.stdout.read().splitlines())


def write_forever(way: str, place: Path) -> None:
    write = WAYS[way][0](place)
    while True:
        write()
        os.write(1, b"written\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--forever"]:
        write_forever(sys.argv[2], Path(sys.argv[3]))
    typer.run(main)
