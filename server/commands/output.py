"""What commands print: tables for people, tab-separated lines for programs, JSON for either."""

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Column:
    """A column of a table, or a line of a record."""

    title: str
    shown: Callable[[Any], str] = str
    """How a terminal shows a value that is not None; programs get the value itself."""


def size(nbytes: int) -> str:
    """A number of bytes for people, as `230.9 kB`."""
    return decimal(nbytes)


def time(moment: str) -> str:
    """A moment of ISO 8601 for people, in the time zone of this machine."""
    return f"{datetime.fromisoformat(moment).astimezone():%Y-%m-%d %H:%M}"


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def print_table(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> None:
    """Print a row on each line: below a header on a terminal, else between tabs."""
    if not sys.stdout.isatty():
        for row in rows:
            typer.echo("\t".join(map(_plain, row)))
        return
    table = Table(*(column.title for column in columns), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(_cell, columns, row))
    Console().print(table)


def print_record(columns: Sequence[Column], values: Sequence[Any]) -> None:
    """Print the values of one thing, each on a line with its title."""
    if not sys.stdout.isatty():
        for column, value in zip(columns, values, strict=True):
            typer.echo(f"{column.title}\t{_plain(value)}")
        return
    table = Table.grid(padding=(0, 2))
    for column, value in zip(columns, values, strict=True):
        table.add_row(Text(column.title, style="bold"), _cell(column, value))
    Console().print(table)


def print_done(result: Any, as_json: bool, text: str) -> None:
    """Print what a command has done, for people or as JSON."""
    if as_json:
        print_json(result)
    else:
        typer.echo(text)


@contextmanager
def ended_by(command: str, *errors: type[Exception]) -> Iterator[None]:
    """Within, these errors end the command, which says what they say."""
    try:
        yield
    except errors as error:
        typer.echo(f"infuse {command}: {error}", err=True)
        raise typer.Exit(1) from None


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def printable(text: str) -> str:
    """The text without what would move the cursor or begin a line: not all of it is ours."""
    return "".join(each if each.isprintable() else "?" for each in text)


def harmless(text: str) -> str:
    """A text of several lines without control characters, which could rewrite what a terminal
    shows."""
    return _CONTROL.sub("", text)


def _plain(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return yes_or_no(value)
        case dict() | list():
            return json.dumps(value)
        case _:
            return printable(str(value))


def _cell(column: Column, value: Any) -> Text:
    return Text("-" if value is None else printable(column.shown(value)))
