"""The heat map of `infuse adapters show --plot`: what an adapter amplifies and inhibits."""

import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from infuse.server.commands.output import Column, print_table, printable

_CLEAR = 0.25
"""From this share of the largest change on, a cell has a sign."""
_DARK, _LIGHT = 48, 255
Changes = dict[str, dict[int | None, float]]
"""Module -> layer -> how far its vector's mean is from 1. A module outside of layers has None."""


def print_heat_map(vectors: dict[str, Any]) -> None:
    """Print a row for each kind of module and a cell for each layer; programs get numbers.

    `vectors`: as `GET /v1/adapters/{name}/vectors` answers.
    """
    changes: Changes = {}
    for each in vectors["modules"]:
        module = f"{each['kind'].rpartition('*.')[2]} ({each['side']})"
        changes.setdefault(module, {})[each["layer"]] = each["mean"] - 1
    found = {layer for row in changes.values() for layer in row}
    layers = sorted(found, key=lambda layer: -1 if layer is None else layer)
    if sys.stdout.isatty():
        _draw(changes, layers)
    else:
        columns = [Column("module"), *(Column(str(layer)) for layer in layers)]
        print_table(columns, ([name, *map(row.get, layers)] for name, row in changes.items()))


def _draw(changes: Changes, layers: list[int | None]) -> None:
    largest = max((abs(each) for row in changes.values() for each in row.values()), default=0.0)
    table = Table.grid(padding=(0, 2))
    for name, row in changes.items():
        cells = Text.assemble(*(_cell(row.get(layer), largest) for layer in layers))
        table.add_row(Text(printable(name)), cells)
    Console().print(table)
    typer.echo(
        f"{len(layers)} layers from left to right; + amplifies and - inhibits, on average by "
        f"{largest:.3f} at most"
    )


def _cell(change: float | None, largest: float) -> tuple[str, str]:
    """A cell's text and its style: red where features are amplified, blue where inhibited."""
    if change is None:
        return " ", ""
    share = abs(change) / largest if largest else 0.0
    sign = " " if share < _CLEAR else "+" if change > 0 else "-"
    bright = round(_DARK + (_LIGHT - _DARK) * share)
    red, blue = (bright, _DARK) if change > 0 else (_DARK, bright)
    return sign, f"bright_white on rgb({red},{_DARK},{blue})"
