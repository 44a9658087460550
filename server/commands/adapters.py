"""`infuse adapters …`: the adapters of a running server."""

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from infuse.adapters.checkpoint.adapter_files import folder_with_adapter
from infuse.adapters.errors import InvalidAdapter
from infuse.server.commands.heat_map import print_heat_map
from infuse.server.commands.options import HERE, ApiKey, Url, connected, weighted
from infuse.server.commands.output import (
    AsJson,
    Column,
    print_done,
    print_json,
    print_record,
    print_table,
    yes_or_no,
)
from infuse.server.commands.output import size as shown_size
from infuse.server.commands.output import time as shown_time
from infuse.server.commands.progress import progress_bar

adapters_app = typer.Typer(
    no_args_is_help=True, help="Add, list, change, download and check adapters of a running server."
)
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Source = Annotated[
    str,
    typer.Argument(
        help="What PEFT's save_pretrained wrote: a folder here, or hf://, s3://, gs://, az:// or "
        "file://, which the server fetches."
    ),
]
_LISTED = (
    Column("name"),
    Column("revision"),
    Column("size", shown_size),
    Column("created", shown_time),
)
_REVISIONS = (
    Column("revision"),
    Column("digest"),
    Column("created", shown_time),
    Column("source"),
    Column("by"),
)
_SHOWN = (
    *_LISTED,
    Column("source"),
    Column("by"),
    Column("signer"),
    Column("digest"),
    Column("parent"),
    Column("description"),
    Column("tags", ", ".join),
    Column("pinned", yes_or_no),
    Column("enabled", yes_or_no),
    Column("damaged", yes_or_no),
    Column("recipe"),
)
_REPLACE = {"adapter_exists": "give --replace to add a revision, or remove it first"}
_REMOVE = {"adapter_exists": "take another name, or remove it first: infuse adapters remove"}


@adapters_app.command()
def add(
    name: Name,
    source: Source,
    replace: Annotated[bool, typer.Option(help="Add a revision to a known adapter.")] = False,
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Add an adapter.

    Example: infuse adapters add support-de ./out/support-de

    Example: infuse adapters add support-de hf://my-org/support-de@main
    """
    _tell_folder(source)
    with connected(url, api_key, **_REPLACE) as client, progress_bar("Uploading") as progress:
        upload = client.replace if replace else client.add
        answer = upload(name, source, progress)
    _print_change(answer, as_json)


@adapters_app.command("list")
def list_adapters(url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the adapters: name, revision, bytes, time.

    Example: infuse adapters list --json
    """
    with connected(url, api_key) as client:
        adapters = client.adapters()
    if as_json:
        print_json(adapters)
    else:
        print_table(_LISTED, ([each[column.title] for column in _LISTED] for each in adapters))


@adapters_app.command()
def show(
    name: Name,
    plot: Annotated[
        bool, typer.Option("--plot", help="Show what it amplifies and inhibits, by layer.")
    ] = False,
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show an adapter: its revision, where that came from, its details; or its vectors.

    Example: infuse adapters show support-de

    Example: infuse adapters show support-de --plot
    """
    with connected(url, api_key) as client:
        adapter = client.vectors(name) if plot else client.adapter(name)
    if as_json:
        print_json(adapter)
    elif plot:
        print_heat_map(adapter)
    else:
        print_record(_SHOWN, [adapter[column.title] for column in _SHOWN])


@adapters_app.command()
def update(
    name: Name,
    description: Annotated[str | None, typer.Option(help="Free text.")] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option(help="A tag, in place of those before; several times for several."),
    ] = None,
    pinned: Annotated[
        bool | None, typer.Option("--pinned/--no-pinned", help="Keep it on the device.")
    ] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enabled/--no-enabled", help="Let requests name it.")
    ] = None,
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Change what is said of an adapter, and whether it is pinned and enabled. What is not given
    stays.

    Example: infuse adapters update support-de --description 'German support' --tag support --pinned
    """
    given = {"description": description, "tags": tag, "pinned": pinned, "enabled": enabled}
    changes = {field: value for field, value in given.items() if value is not None}
    if not changes:
        raise typer.BadParameter("give --description, --tag, --pinned or --enabled")
    with connected(url, api_key) as client:
        answer = client.describe(name, changes)
    print_done(answer, as_json, f"{name} is updated")


@adapters_app.command()
def remove(name: Name, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Remove an adapter; requests that run on it finish.

    Example: infuse adapters remove support-de
    """
    with connected(url, api_key) as client:
        client.remove(name)
    print_done({"name": name, "removed": True}, as_json, f"{name} is removed")


@adapters_app.command()
def combine(
    name: Name,
    parts: Annotated[list[str], typer.Argument(help="One or several ADAPTER or ADAPTER=WEIGHT.")],
    method: Annotated[
        str,
        typer.Option(help="linear, product, task_arithmetic, ties, dare_linear or dare_ties."),
    ] = "task_arithmetic",
    density: Annotated[float, typer.Option(help="The share that TIES and DARE keep.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The seed by which DARE drops differences.")] = 0,
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a new adapter out of others.

    Example: infuse adapters combine support-all support-de=0.5 support-fr=0.5 --method ties
    """
    adapters = [{"name": each, "weight": weight} for each, weight in map(weighted, parts)]
    with connected(url, api_key, **_REMOVE) as client:
        answer = client.combine(name, adapters, method=method, density=density, seed=seed)
    _print_change(answer, as_json)


@adapters_app.command()
def revisions(name: Name, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List an adapter's revisions: number, digest, time, source, key.

    Example: infuse adapters revisions support-de
    """
    with connected(url, api_key) as client:
        found = client.revisions(name)
    if as_json:
        print_json(found)
    else:
        short = [each | {"digest": each["digest"][:12]} for each in found]
        print_table(_REVISIONS, ([each[column.title] for column in _REVISIONS] for each in short))


@adapters_app.command()
def rollback(
    name: Name,
    revision: Annotated[int, typer.Argument(help="The revision to go back to.")],
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Go back to an older revision, as a new one.

    Example: infuse adapters rollback support-de 2
    """
    with connected(url, api_key) as client:
        answer = client.roll_back(name, revision)
    _print_change(answer, as_json)


@adapters_app.command()
def download(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="The folder to create.")],
    url: Url = HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Write an adapter's files to a folder, which PEFT loads.

    Example: infuse adapters download support-de ./support-de
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        typer.echo(f"{folder}: {error.strerror}; name a new folder", err=True)
        raise typer.Exit(1) from None
    try:
        with connected(url, api_key) as client, progress_bar("Downloading") as progress:
            client.download(name, folder, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    files = sorted(path.name for path in folder.iterdir())
    done = {"name": name, "folder": str(folder), "files": files}
    print_done(done, as_json, f"{folder} holds {name}")


@adapters_app.command()
def check(source: Source, url: Url = HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Check whether the server could serve an adapter, and keep nothing.

    Example: infuse adapters check ./out/support-de
    """
    _tell_folder(source)
    with connected(url, api_key) as client, progress_bar("Uploading") as progress:
        answer = client.check(source, progress)
    _warn(answer)
    print_done(answer, as_json, f"{source} fits: it rescales {answer['targets']} modules")


def _tell_folder(source: str) -> None:
    """Say which sub-folder is taken, where it is not the folder itself."""
    try:
        folder = folder_with_adapter(Path(source))
    except (InvalidAdapter, OSError):
        return
    if folder != Path(source):
        typer.echo(f"The adapter is in the sub-folder {folder}", err=True)


def _print_change(answer: dict[str, Any], as_json: bool) -> None:
    """Print what became of an adapter's revision."""
    _warn(answer)
    done = "is unchanged" if answer["unchanged"] else f"is revision {answer['revision']}"
    print_done(answer, as_json, f"{answer['name']} {done}")


def _warn(answer: dict[str, Any]) -> None:
    for warning in answer["warnings"]:
        typer.echo(f"Warning: {warning}", err=True)
