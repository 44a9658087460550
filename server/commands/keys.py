"""`infuse keys …`: makes, lists, revokes and rotates the keys of a keys file."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from infuse.server.commands.output import (
    AsJson,
    Column,
    ended_by,
    print_done,
    print_json,
    print_table,
)
from infuse.server.commands.settings import from_file
from infuse.server.keys.key_file import BadKeysFile, Entry, Key, edited, read_entries
from infuse.server.keys.secrets import hash_key, new_key

keys_app = typer.Typer(
    no_args_is_help=True,
    help="Make, list, revoke and rotate keys. A running server follows the file within seconds.",
)

_HERE = "keys.json"
File = Annotated[
    Path,
    typer.Option(
        envvar="INFUSE_KEYS_FILE",
        help="The keys file.",
        default_factory=from_file("keys-file", _HERE),
        show_default=_HERE,
    ),
]
Name = Annotated[str, typer.Argument(help="The key's name, which is its tenant's.")]
Patterns = list[str] | None
_COLUMNS = tuple(map(Column, ("name", "id or claims", "roles", "expires", "scope")))
_SEEN_ONCE = "The key is printed once; the file keeps a hash of it."


@keys_app.command()
def create(
    name: Name,
    role: Annotated[
        list[str] | None,
        typer.Option(help="generate, admin or metrics; several times for several. [generate]"),
    ] = None,
    adapters: Annotated[
        Patterns, typer.Option(help="Pattern of adapters to use, see and change, as 'acme/*'.")
    ] = None,
    use: Annotated[Patterns, typer.Option(help="Pattern of adapters to use.")] = None,
    see: Annotated[Patterns, typer.Option(help="Pattern of adapters to see alone.")] = None,
    change: Annotated[Patterns, typer.Option(help="Pattern of adapters to change.")] = None,
    source: Annotated[
        Patterns, typer.Option(help="Prefix of URLs to fetch adapters from, as hf://acme/.")
    ] = None,
    max_adapters: Annotated[int | None, typer.Option(help="Most adapters it may change.")] = None,
    max_adapter_bytes: Annotated[int | None, typer.Option(help="Most bytes of these.")] = None,
    max_merges: Annotated[int | None, typer.Option(help="Most merges that are kept.")] = None,
    weight: Annotated[
        float | None, typer.Option(help="Its share of the model beside others. [1]")
    ] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="HTTP requests.")] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens of prompts and answers.")
    ] = None,
    burst_tokens: Annotated[
        int | None, typer.Option(help="How many of these at once. [a minute's]")
    ] = None,
    guaranteed_tokens_per_minute: Annotated[
        int | None, typer.Option(help="Tokens that it gets ahead of others.")
    ] = None,
    max_requests_at_once: Annotated[int | None, typer.Option(help="HTTP requests.")] = None,
    max_queue_share: Annotated[
        float | None, typer.Option(help="Share of the queue's places, up to 1.")
    ] = None,
    max_prompt_tokens: Annotated[int | None, typer.Option(help="Longest prompt.")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    claim: Annotated[
        Patterns,
        typer.Option(help="NAME=PATTERN of a claim: lets in tokens that have it; makes no key."),
    ] = None,
    *,
    file: File,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, or let in tokens by their claims. Options that are not given set
    no limit.

    Example: infuse keys create acme --role generate --role admin --adapters 'acme/*'

    Example: infuse keys create acme --adapters 'acme/*' --claim groups=acme
    """
    common = adapters or []
    patterns = {
        "use": [*common, *(use or [])],
        "see": see or [],
        "change": [*common, *(change or [])],
    }
    scope = {
        "adapters": {each: given for each, given in patterns.items() if given} or None,
        "sources": source,
        "max_adapters": max_adapters,
        "max_adapter_bytes": max_adapter_bytes,
        "max_merges": max_merges,
        "weight": weight,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "burst_tokens": burst_tokens,
        "guaranteed_tokens_per_minute": guaranteed_tokens_per_minute,
        "max_requests_at_once": max_requests_at_once,
        "max_queue_share": max_queue_share,
        "max_prompt_tokens": max_prompt_tokens,
        "max_answer_tokens": max_answer_tokens,
    }
    limits = {each: given for each, given in scope.items() if given is not None}
    key_id, key = new_key()
    opens = {"claims": _claims(claim)} if claim else {"id": key_id, "hash": hash_key(key)}
    entry: Entry = {"name": name, **opens, "roles": role or ["generate"]}
    if limits:
        entry["scope"] = limits
    _check(entry)
    with _edited(file) as entries:
        if any(each["name"] == name for each in entries):
            raise BadKeysFile(
                f"{file} has a key '{name}' already: take another name, or rotate or revoke it"
            )
        entries.append(entry)
    if claim:
        typer.echo(f"Tokens with {_shown(entry)} are {name}'s; no key was made.", err=True)
    if not claim or as_json:
        _show(entry, None if claim else key, as_json)


@keys_app.command("list")
def list_keys(file: File, as_json: AsJson = False) -> None:
    """List the keys: name, id or claims, roles, end, scope. No key is among it.

    Example: infuse keys list --json
    """
    with ended_by("keys", BadKeysFile):
        entries = [_without_secrets(each) for each in read_entries(file)]
    if as_json:
        print_json(entries)
    else:
        print_table(_COLUMNS, map(_row, entries))


@keys_app.command()
def revoke(name: Name, file: File, as_json: AsJson = False) -> None:
    """Revoke a key. Requests that run finish.

    Example: infuse keys revoke acme
    """
    with _edited(file) as entries:
        kept = [each for each in entries if each["name"] != name]
        if len(kept) == len(entries):
            raise BadKeysFile(f"{file} has no key '{name}': `infuse keys list` shows what it has")
        entries[:] = kept
    print_done({"name": name, "revoked": True}, as_json, f"{name} is revoked")


@keys_app.command()
def rotate(
    name: Name,
    grace_hours: Annotated[
        float, typer.Option(min=0, max=8760, help="Hours that the old key still works.")
    ] = 0.0,
    *,
    file: File,
    as_json: AsJson = False,
) -> None:
    """Make a new key with the same roles and scope, print it, and end the old one.

    Example: infuse keys rotate acme --grace-hours 24
    """
    end = datetime.now(UTC) + timedelta(hours=grace_hours)
    key_id, key = new_key()
    secret = {"id": key_id, "hash": hash_key(key)}
    with _edited(file) as entries:
        known = [each for each in entries if each["name"] == name and not each.get("claims")]
        if not known:
            raise BadKeysFile(f"{file} has no key '{name}': `infuse keys list` shows what it has")
        newest = {k: v for k, v in known[-1].items() if k not in ("key", "expires")}
        for each in known:
            before = Key.model_validate(each).expires
            each["expires"] = min(before or end, end).isoformat(timespec="seconds")
        entries.append(newest | secret)
    _show(newest | secret, key, as_json)


def _check(entry: Entry) -> None:
    """End the command where an option has a value that no key may have."""
    try:
        Key.model_validate(entry)
    except ValidationError as error:
        for each in error.errors(include_input=False):
            where = ".".join(map(str, each["loc"])) or "the key"
            problem = each["msg"].removeprefix("Value error, ")
            typer.echo(f"infuse keys: {where}: {problem}", err=True)
        raise typer.Exit(2) from None


def _claims(given: list[str]) -> dict[str, list[str]]:
    """The patterns of each claim's name, of `name=pattern`."""
    claims: dict[str, list[str]] = {}
    for each in given:
        name, _, pattern = each.partition("=")
        claims.setdefault(name, []).append(pattern)
    return claims


def _shown(entry: Entry) -> str:
    """What opens the server as an entry, as far as everybody may see it."""
    claims = entry.get("claims") or {}
    patterns = [f"{name}={each}" for name, several in claims.items() for each in several]
    return ",".join(patterns) or str(entry.get("id", "in plain"))


def _without_secrets(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("key", "hash")}


@contextmanager
def _edited(file: Path) -> Iterator[list[Entry]]:
    with ended_by("keys", BadKeysFile), edited(file) as entries:
        yield entries


def _row(entry: Entry) -> list[Any]:
    known = [entry["name"], _shown(entry), ",".join(entry["roles"])]
    return [*known, entry.get("expires"), entry.get("scope")]


def _show(entry: Entry, key: str | None, as_json: bool) -> None:
    """Print a new key. Only it goes to the standard output, for scripts to take it. `key`: None
    where an entry has none."""
    if as_json:
        print_json(_without_secrets(entry) | ({} if key is None else {"key": key}))
    else:
        typer.echo(key)
    if key is not None:
        typer.echo(_SEEN_ONCE, err=True)
