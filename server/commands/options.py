"""The arguments that several commands take, and the client of the server that they name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from infuse.server.client import Client, ClientError

HERE = "http://127.0.0.1:8000"
Url = Annotated[str, typer.Option(envvar="INFUSE_URL", help="The server's URL.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="INFUSE_API_KEY", help="A key with the role admin.")
]
GenerateKey = Annotated[
    str | None, typer.Option(envvar="INFUSE_API_KEY", help="A key with the role generate.")
]
_FIXES = {"invalid_api_key": "give one with --api-key, or set INFUSE_API_KEY"}
"""Error code -> how to mend it here, where the server says how to over HTTP."""


@contextmanager
def connected(url: str, api_key: str | None, **fixes: str) -> Iterator[Client]:
    """A client of the server. Its errors end the command. `fixes`: as `_FIXES`, of this command."""
    try:
        with Client(url, api_key) as client:
            yield client
    except ClientError as error:
        typer.echo(told(error, **fixes), err=True)
        raise typer.Exit(1) from None


def told(error: ClientError, **fixes: str) -> str:
    """The error's message, with our way to mend it in place of the server's, which is for HTTP."""
    fix = (_FIXES | fixes).get(error.code or "")
    return str(error) if fix is None else f"{str(error).partition(';')[0]}; {fix}"


def weighted(text: str) -> tuple[str, float]:
    """The name and the weight of `NAME` or `NAME=WEIGHT`."""
    name, equals, weight = text.partition("=")
    try:
        return name, float(weight) if equals else 1.0
    except ValueError:
        raise typer.BadParameter(f"'{weight}' is no weight; write {name}=0.5") from None
