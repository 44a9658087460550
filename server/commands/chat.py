"""`infuse chat`: a playground for the adapters of a running server."""

import json
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Annotated, Any

import typer

from infuse.server.client import Client, ClientError
from infuse.server.commands.options import HERE, GenerateKey, Url, connected, told, weighted
from infuse.server.commands.output import AsJson, harmless

with suppress(ImportError):
    # Gives `input` its history and editing.
    import readline  # noqa: F401

_HELP = """\
/use ADAPTER            talk to an adapter; to some of it: /use ADAPTER=0.5
/use ADAPTER ADAPTER    talk to a mixture, each with its weight if you like
/use                    talk to the base model
/adapters               list the adapters
/system TEXT            begin anew, with this system message
/new                    begin anew
/quit                   end, as Ctrl-D does; Ctrl-C ends an answer"""

_LISTED = {"model_not_found": "infuse adapters list shows the adapters"}


def chat(
    adapters: Annotated[
        list[str] | None,
        typer.Argument(help="ADAPTER, or several ADAPTER=WEIGHT to mix. Default: the base model."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    url: Url = HERE,
    api_key: GenerateKey = None,
    as_json: AsJson = False,
) -> None:
    """Talk to the base model, an adapter or a mixture. What is piped in is one message.

    Example: infuse chat support-de

    Example: infuse chat support-de=0.7 sentiment --temperature 0

    Example: infuse chat order-json < mail.txt
    """
    asked = {"temperature": temperature, "max_tokens": max_tokens}
    with connected(url, api_key, **_LISTED) as client:
        playground = _Playground(client, asked, as_json)
        playground.use(adapters or [])
        if system is not None:
            playground.begin(system)
        if sys.stdin.isatty():
            typer.echo("/help lists what else there is to type.", err=True)
            _converse(playground)
        else:
            playground.answer(sys.stdin.read().rstrip("\n"))


class _Playground:
    """A conversation, and who answers in it."""

    def __init__(self, client: Client, asked: dict[str, Any], as_json: bool) -> None:
        """`asked`: fields of each request; None: the server's default."""
        self._client = client
        self._base = client.models()[0]["id"]
        self._asked = {name: value for name, value in asked.items() if value is not None}
        self._as_json = as_json
        self._messages: list[dict[str, str]] = []
        self.use([])

    @property
    def name(self) -> str:
        """Who answers, for people."""
        return " ".join(self._adapters) or self._base

    def use(self, adapters: list[str]) -> None:
        parts = [{"name": name, "weight": weight} for name, weight in map(weighted, adapters)]
        self._target: dict[str, Any] = {"model": self._base}
        if len(parts) > 1:
            self._target |= {"adapters": parts}
        elif parts:
            self._target = {"model": parts[0]["name"]}
            # With a strength, be it 1, it would be a mixture.
            if parts[0]["weight"] != 1:
                self._target["strength"] = parts[0]["weight"]
        self._adapters = adapters

    def begin(self, system: str | None = None) -> None:
        """Forget the conversation. Its system message stays where no new one is given."""
        kept = [each for each in self._messages if each["role"] == "system"]
        self._messages = kept if system is None else [{"role": "system", "content": system}]

    def adapters(self) -> list[str]:
        return [each["id"] for each in self._client.models()[1:]]

    def answer(self, text: str) -> None:
        """Print the answer to a message, as it comes. Ctrl-C ends it."""
        messages = [*self._messages, {"role": "user", "content": text}]
        body = self._asked | self._target | {"messages": messages}
        said = ""
        with closing(self._client.chat(body)) as parts, suppress(KeyboardInterrupt):
            for part in parts:
                said += part
                if not self._as_json:
                    sys.stdout.write(harmless(part))
                    sys.stdout.flush()
        typer.echo(json.dumps({"model": self.name, "content": said}) if self._as_json else "")
        self._messages = [*messages, {"role": "assistant", "content": said}]


def _converse(playground: _Playground) -> None:
    """Answer what is typed, until its end."""
    for line in _typed(playground):
        word, _, rest = line.partition(" ")
        try:
            match word:
                case "/use":
                    playground.use(rest.split())
                case "/adapters":
                    typer.echo("\n".join(playground.adapters()))
                case "/system":
                    playground.begin(rest)
                case "/new":
                    playground.begin()
                case "/help":
                    typer.echo(_HELP)
                case "/quit":
                    return
                case _ if word.startswith("/"):
                    typer.echo(f"There is no command {word}; /help lists them.", err=True)
                case _ if line:
                    playground.answer(line)
        except ClientError as error:
            typer.echo(told(error, model_not_found="/adapters lists them"), err=True)
        except typer.BadParameter as error:
            typer.echo(error.format_message(), err=True)


def _typed(playground: _Playground) -> Iterator[str]:
    """The lines that are typed."""
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(f"{playground.name}> ").strip()
    typer.echo()
