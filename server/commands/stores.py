"""`infuse backup`, `infuse restore` and `infuse audit …`, for a folder or a bucket of adapters."""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from infuse.adapters.errors import AdapterError
from infuse.adapters.storage.audit import audit, entries_of
from infuse.adapters.storage.backup import Backup, back_up
from infuse.adapters.storage.backup import restore as restore_from
from infuse.adapters.storage.chain import Event
from infuse.server.commands.output import AsJson, Column, ended_by, print_done, print_table
from infuse.server.commands.settings import from_file
from infuse.server.setting_types import BUCKET

audit_app = typer.Typer(
    no_args_is_help=True, help="Show who changed which adapter, and check that nobody edited it."
)
_FOLDER = "data/adapters"
Store = Annotated[
    str,
    typer.Option(
        envvar="INFUSE_ADAPTERS_DIR",
        help="Where the adapters are kept.",
        default_factory=from_file("adapters-dir", _FOLDER),
        show_default=_FOLDER,
    ),
]
_COLUMNS = tuple(map(Column, ("number", "time", "by", "adapter", "what")))


def backup(
    destination: Annotated[
        str, typer.Argument(help="An empty folder, or s3://, gs:// or az:// with a free prefix.")
    ],
    adapters_dir: Store,
    as_json: AsJson = False,
) -> None:
    """Copy all adapters, with their revisions and history, as they are at one moment. Servers may
    run meanwhile.

    Example: infuse backup s3://my-backups/monday --adapters-dir ./data/adapters
    """
    with ended_by("backup", AdapterError, OSError):
        made = back_up(_place(adapters_dir), _place(destination))
    _print(made, as_json, destination)
    if made.damaged:
        typer.echo(
            f"infuse backup: the files of {', '.join(made.damaged)} are damaged and not in the "
            "backup, all others are: upload these again, or delete them",
            err=True,
        )
        raise typer.Exit(1)


def restore(
    source: Annotated[str, typer.Argument(help="What `infuse backup` has written.")],
    adapters_dir: Store,
    as_json: AsJson = False,
) -> None:
    """Make the adapters of a backup anew, in a folder or bucket that has none. Servers start there
    afterwards.

    Example: infuse restore s3://my-backups/monday --adapters-dir ./data/adapters
    """
    with ended_by("restore", AdapterError, OSError):
        made = restore_from(_place(source), _place(adapters_dir))
    _print(made, as_json, adapters_dir)
    if made.damaged:
        typer.echo(f"The backup was made without the files of {', '.join(made.damaged)}", err=True)


@audit_app.command()
def verify(
    head: Annotated[
        str | None,
        typer.Option(help="What this command printed before, kept out of the store's reach."),
    ] = None,
    *,
    adapters_dir: Store,
    as_json: AsJson = False,
) -> None:
    """Check that no change was edited, removed, added or moved since it was recorded.

    Example: infuse audit verify --adapters-dir s3://my-bucket/adapters
    """
    with ended_by("audit verify", AdapterError, OSError):
        found = audit(_place(adapters_dir), head)
    for fault in found.faults:
        typer.echo(f"infuse audit verify: {fault}", err=True)
    if found.faults:
        raise typer.Exit(1)
    if found.unchained:
        typer.echo(
            f"Events 1 to {found.unchained} were recorded without a chain, by an older release: "
            "they are checked as they were at the first chained event.",
            err=True,
        )
    text = f"{len(found.entries)} events are as they were recorded; head: {found.head}"
    print_done({"events": len(found.entries), "head": found.head}, as_json, text)


@audit_app.command("list")
def list_changes(
    adapters_dir: Store,
    as_json: AsJson = False,
) -> None:
    """List all changes: number, time, key, adapter, what was done.

    Example: infuse audit list --adapters-dir ./data/adapters
    """
    with ended_by("audit list", AdapterError, OSError):
        entries = entries_of(_place(adapters_dir))
    events = [{"number": each.number, **(each.event or {"event": "damaged"})} for each in entries]
    if as_json:
        for event in events:
            typer.echo(json.dumps(event))
    else:
        print_table(_COLUMNS, (_row(each) for each in events if each.get("event") not in _UNSEEN))


_UNSEEN = ("opened", "void")
"""Events in a bucket that change no adapter."""


def _row(event: Event) -> list[Any]:
    who = [event.get(each) or None for each in ("number", "time", "by", "name")]
    match event.get("event"):
        case "revision":
            done = f"revision {event.get('number')} by {event.get('source')}"
            if signer := event.get("signer"):
                done += f", signed by {signer}"
        case "details":
            names = ("description", "tags", "pinned", "enabled")
            done = f"details {json.dumps({n: event.get(n) for n in names}, ensure_ascii=False)}"
        case other:
            done = str(other)
    return [*who, done]


def _print(made: Backup, as_json: bool, where: str) -> None:
    text = f"{where} holds {made.adapters} adapters, as of event {made.events}"
    print_done(asdict(made), as_json, text)


def _place(text: str) -> Path | str:
    if "://" not in text:
        return Path(text)
    if re.match(BUCKET, text):
        return text
    raise typer.BadParameter(
        f"'{text}' is no folder and no bucket: give a path, s3://…, gs://… or az://…"
    )
