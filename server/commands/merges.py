"""`infuse merges …`: follows the merges of a running server."""

import time
from typing import Annotated, Any

import typer

from infuse.server.commands.options import HERE, ApiKey, Url, connected
from infuse.server.commands.output import (
    AsJson,
    Column,
    print_done,
    print_json,
    print_record,
    print_table,
)
from infuse.server.commands.output import size as shown_size
from infuse.server.commands.output import time as shown_time
from infuse.server.commands.progress import progress_bar

merges_app = typer.Typer(
    no_args_is_help=True, help="Follow merges: what a server folds into copies of its base model."
)
Id = Annotated[str, typer.Argument(help="The merge's id.")]
_POLL_SECONDS = 0.5
_ENDED = ("succeeded", "failed", "cancelled")


def _percent(share: float) -> str:
    return f"{share:.0%}"


_COLUMNS = (
    Column("id"),
    Column("state"),
    Column("progress", _percent),
    Column("adapters"),
    Column("size", shown_size),
    Column("created", shown_time),
)


@merges_app.command("list")
def list_merges(url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the merges, oldest first: id, state, progress, adapters, bytes, time.

    Example: infuse merges list
    """
    with connected(url, api_key) as client:
        merges = client.merges()
    if as_json:
        print_json(merges)
    else:
        print_table(_COLUMNS, map(_row, merges))


@merges_app.command()
def show(id: Id, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show how far a merge is, or why it failed.

    Example: infuse merges show merge-20261124061500123456-9f3a
    """
    with connected(url, api_key) as client:
        _print(client.merge(id), as_json)


@merges_app.command()
def wait(id: Id, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Wait until a merge has ended. The exit status is 1 where it did not succeed.

    Example: infuse merges wait merge-20261124061500123456-9f3a
    """
    with connected(url, api_key) as client, progress_bar("Merging") as progress:
        while (merge := client.merge(id))["state"] not in _ENDED:
            progress(merge["progress"])
            time.sleep(_POLL_SECONDS)
    _print(merge, as_json)
    if merge["state"] != "succeeded":
        raise typer.Exit(1)


@merges_app.command()
def cancel(id: Id, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Cancel a merge that waits or runs.

    Example: infuse merges cancel merge-20261124061500123456-9f3a
    """
    with connected(url, api_key) as client:
        state = client.merge(id)["state"]
        if state in _ENDED:
            # The server would forget it, and its model with it.
            typer.echo(f"{id} has ended already: {state}", err=True)
            raise typer.Exit(1)
        client.cancel_merge(id)
    print_done({"id": id, "cancelled": True}, as_json, f"{id} is cancelled")


def _row(merge: dict[str, Any]) -> list[Any]:
    recipe = merge["recipe"]
    parts = ", ".join(f"{part['name']}={part['weight']:g}" for part in recipe["adapters"])
    begun = [merge[name] for name in ("id", "state", "progress")]
    return [*begun, f"{recipe['method']} of {parts}", merge["size"], merge["created"]]


def _print(merge: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(merge)
    else:
        more = (Column("base"), Column("finished", shown_time), Column("by"), Column("error"))
        print_record((*_COLUMNS, *more), [*_row(merge), *(merge[each.title] for each in more)])
