"""`infuse serve`, `infuse deploy`, commands for keys and for stores, and `infuse adapters …` for a
server."""

import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import CliApp

from infuse.adapters.errors import AdapterError
from infuse.server import openmp
from infuse.server.client import AdminClient, ClientError
from infuse.server.keys.commands import keys_app
from infuse.server.observability import logs
from infuse.server.on_ray.settings import DeploySettings
from infuse.server.settings import Settings
from infuse.server.store_commands import audit_app, backup, restore

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve many IA3 adapters on one base model.",
)
adapters_app = typer.Typer(
    no_args_is_help=True, help="Add, list, remove and check adapters of a server that runs."
)
app.add_typer(adapters_app, name="adapters")
app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.command()(backup)
app.command()(restore)

_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands whose options are settings, which pydantic reads."""

Url = Annotated[str, typer.Option(envvar="INFUSE_URL", help="The server's URL.")]
ApiKey = Annotated[
    str | None, typer.Option(envvar="INFUSE_API_KEY", help="A key with the role admin.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
Name = Annotated[str, typer.Argument(help="The adapter's name.")]
Source = Annotated[
    str,
    typer.Argument(
        help="What PEFT's save_pretrained wrote: a folder here, or hf://, s3://, gs://, az:// or "
        "file://, which the server fetches."
    ),
]
_S = TypeVar("_S", bound=Settings)
_HERE = "http://127.0.0.1:8000"
_THREAD_SECONDS = 1.0
"""How long a thread that is still at work has to end, after the server has stopped."""


def main() -> None:
    os.environ.update(openmp.variables())
    if not sys.stderr.isatty():
        # A progress bar is no line of a log, and ends the start where the log cannot be written.
        os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("torchao", "torch.utils._pytree"):
        # transformers imports torchao, which warns that it has no kernels for this machine.
        logging.getLogger(name).setLevel(logging.ERROR)
    app()


@app.command()
def merge(
    output: Annotated[Path, typer.Argument(help="The folder to create.")],
    adapters: Annotated[list[str], typer.Argument(help="One or several FOLDER or FOLDER=WEIGHT.")],
    model: Annotated[
        str | None,
        typer.Option(help="Folder or cached hub id of the base model. Default: the default model."),
    ] = None,
    composition: Annotated[
        Literal["product", "linear"], typer.Option(help="How several adapters are mixed.")
    ] = "product",
) -> None:
    """Fold adapters into a copy of the base model, which plain transformers loads.

    `product` mixes as several active adapters do in PEFT, `linear` as its `add_weighted_adapter`.

    Example: infuse merge ./merged ./out/support-de --model ./my-base-model
    """
    # These import torch and transformers: seconds that nothing else here need wait for.
    from infuse.adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
    from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
    from infuse.adapters.derive.combine import Recipe, mix
    from infuse.adapters.derive.merge import merge as merge_into
    from infuse.server.engine import EngineError
    from infuse.server.engine.model_files import model_folder

    parts = [_part(adapter) for adapter in adapters]
    weights = tuple(part["weight"] for part in parts)
    name = None if model is None or Path(model).is_dir() else model
    try:
        base = BaseCheckpoint(model_folder(model), name)
        vectors = [effective_vectors(read_checkpoint(Path(p["name"])), base.modules) for p in parts]
        merged = mix(vectors, Recipe(method=composition, weights=weights))
        output.parent.mkdir(parents=True, exist_ok=True)
        merge_into(base, merged, output, f"{composition} of {', '.join(adapters)}")
    except (AdapterError, EngineError, OSError) as error:
        typer.echo(f"infuse merge: {error}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{output} holds the merged model")


@app.command(
    context_settings=_PASSED_ON | {"help_option_names": []},
    help="Serve a model. `infuse serve --help` lists every setting.",
)
def serve(context: typer.Context) -> None:
    settings = _settings("serve", context.args, Settings)
    listening = listen(settings)
    # These import torch and transformers: seconds that nothing else here need wait for.
    from infuse.server.app import create_app
    from infuse.server.engine import EngineError
    from infuse.server.keys.key_file import BadKeysFile
    from infuse.server.listener import Server, freeze_heap
    from infuse.server.observability.metering import BadUsageFile

    logs.take_over()
    try:
        application = create_app(settings)
    except (BadKeysFile, BadUsageFile, EngineError, AdapterError, OSError) as error:
        _refuse(str(error))
    freeze_heap()
    server = Server(application, settings, application.state)
    try:
        server.run(sockets=listening)
    finally:
        if settings.uds is not None:
            settings.uds.unlink(missing_ok=True)
    _leave_threads(int(server.has_failed))


@app.command(
    context_settings=_PASSED_ON | {"help_option_names": []},
    help="Serve with several replicas on Ray. `infuse deploy --help` lists every setting.",
)
def deploy(context: typer.Context) -> None:
    settings = _settings("deploy", context.args, DeploySettings)
    with bind(settings.host, settings.port, "deploy") as free:
        port = free.getsockname()[1]
    from infuse.server.engine import EngineError
    from infuse.server.keys.key_file import BadKeysFile

    try:
        from infuse.server.on_ray.deploying import deploy as deploy_on_ray
    except ImportError as error:
        _refuse(f"{error}: pip install 'infuse-server[ray]'", "deploy")
    try:
        deploy_on_ray(settings, port)
    except (BadKeysFile, EngineError, OSError, RuntimeError) as error:
        _refuse(str(error), "deploy")


@app.command(context_settings=_PASSED_ON)
def warm(context: typer.Context) -> None:
    """Compile a model ahead, so that `infuse serve --compile` starts without compiling.

    Takes the same settings as `infuse serve`.
    """
    settings = _settings("warm", ["--compile", *context.args], Settings)
    from infuse.server.app import warm_up
    from infuse.server.engine import EngineError

    try:
        compiled = warm_up(settings)
    except (EngineError, AdapterError, OSError) as error:
        _refuse(str(error), "warm")
    if not compiled:
        raise typer.Exit(1)
    typer.echo("The model is compiled")


def _settings(command: str, arguments: list[str], kind: type[_S]) -> _S:
    try:
        settings = CliApp.run(kind, cli_args=arguments)
    except ValidationError as error:
        for each in error.errors():
            where = " ".join(f"--{str(part).replace('_', '-')}" for part in each["loc"])
            said = each["msg"].removeprefix("Value error, ")
            typer.echo(f"infuse {command}: {where or 'settings'}: {said}", err=True)
        raise typer.Exit(2) from None
    logs.set_up(settings.log_level, settings.log_format)
    return settings


def _leave_threads(status: int) -> None:
    """End the process with this status, also where a thread still works for a request that was
    answered without it."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(_THREAD_SECONDS)
            if thread.is_alive():
                log.warning("A thread is still at work; the server ends without it.")
                logging.shutdown()
                os._exit(status)
    if status:
        raise typer.Exit(status)


def listen(settings: Settings) -> list[socket.socket]:
    """The sockets of a server: the public one, and that of administration where it has its own."""
    here, host = settings.uds, settings.host
    public = bind(host, settings.port) if here is None else bind_unix(here)
    return [public] if settings.admin_port is None else [public, bind(host, settings.admin_port)]


def bind(host: str, port: int, command: str = "serve") -> socket.socket:
    """A socket bound to this address. The model is loaded later, so that a port in use is reported
    at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only on what says that it is TCP; without, each write waits 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        _refuse(f"cannot listen on {host}, port {port}: {error.strerror}", command)
    return listening


def bind_unix(path: Path) -> socket.socket:
    """A unix socket bound to this path, where a server that was killed may have left one."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and listening.connect_ex(str(path)) != 0:
            path.unlink()
        listening.bind(str(path))
        # Who may open the folder may connect, such as a proxy of another user.
        path.chmod(0o666)
    except OSError as error:
        listening.close()
        _refuse(f"cannot listen on {path}: {error.strerror}")
    return listening


def _refuse(reason: str, command: str = "serve") -> NoReturn:
    typer.echo(f"infuse {command}: {reason}", err=True)
    raise typer.Exit(2) from None


@adapters_app.command()
def add(
    name: Name,
    source: Source,
    replace: Annotated[bool, typer.Option(help="Add a revision to a known adapter.")] = False,
    url: Url = _HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Add an adapter.

    Example: infuse adapters add support-de ./out/support-de

    Example: infuse adapters add support-de hf://my-org/support-de@main
    """
    with _client(url, api_key) as client:
        answer = client.replace(name, source) if replace else client.add(name, source)
    _warn(answer)
    done = "is unchanged" if answer["unchanged"] else f"is revision {answer['revision']}"
    _print(answer, as_json, f"{name} {done}")


@adapters_app.command("list")
def list_adapters(url: Url = _HERE, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List the adapters: name, revision, bytes, time.

    Example: infuse adapters list --json
    """
    with _client(url, api_key) as client:
        adapters = client.adapters()
    lines = [f"{a['name']}\t{a['revision']}\t{a['size']}\t{a['created']}" for a in adapters]
    _print(adapters, as_json, "\n".join(lines))


@adapters_app.command()
def remove(name: Name, url: Url = _HERE, api_key: ApiKey = None) -> None:
    """Remove an adapter; requests that run on it finish.

    Example: infuse adapters remove support-de
    """
    with _client(url, api_key) as client:
        client.remove(name)


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
    url: Url = _HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a new adapter out of others.

    Example: infuse adapters combine support-all support-de=0.5 support-fr=0.5 --method ties
    """
    weighted = [_part(part) for part in parts]
    with _client(url, api_key) as client:
        answer = client.combine(name, weighted, method=method, density=density, seed=seed)
    _warn(answer)
    _print(answer, as_json, f"{name} is revision {answer['revision']}")


def _part(text: str) -> dict[str, Any]:
    name, equals, weight = text.partition("=")
    try:
        return {"name": name, "weight": float(weight) if equals else 1.0}
    except ValueError:
        raise typer.BadParameter(f"'{weight}' is no weight; write {name}=0.5") from None


@adapters_app.command()
def revisions(
    name: Name, url: Url = _HERE, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """List an adapter's revisions: number, digest, time, source, key.

    Example: infuse adapters revisions support-de
    """
    with _client(url, api_key) as client:
        found = client.revisions(name)
    lines = [
        f"{r['revision']}\t{r['digest'][:12]}\t{r['created']}\t{r['source']}\t{r['by'] or '-'}"
        for r in found
    ]
    _print(found, as_json, "\n".join(lines))


@adapters_app.command()
def rollback(
    name: Name,
    revision: Annotated[int, typer.Argument(help="The revision to go back to.")],
    url: Url = _HERE,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Go back to an older revision, as a new one.

    Example: infuse adapters rollback support-de 2
    """
    with _client(url, api_key) as client:
        answer = client.roll_back(name, revision)
    done = "is unchanged" if answer["unchanged"] else f"is revision {answer['revision']}"
    _print(answer, as_json, f"{name} {done}")


@adapters_app.command()
def check(
    source: Source, url: Url = _HERE, api_key: ApiKey = None, as_json: AsJson = False
) -> None:
    """Check whether the server could serve an adapter, and keep nothing.

    Example: infuse adapters check ./out/support-de
    """
    with _client(url, api_key) as client:
        answer = client.check(source)
    _warn(answer)
    _print(answer, as_json, f"{source} fits: it rescales {answer['targets']} modules")


@contextmanager
def _client(url: str, api_key: str | None) -> Iterator[AdminClient]:
    """A client of the server. Its errors end the command."""
    try:
        with AdminClient(url, api_key) as client:
            yield client
    except ClientError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


def _warn(answer: dict[str, Any]) -> None:
    for warning in answer["warnings"]:
        typer.echo(f"Warning: {warning}", err=True)


def _print(answer: Any, as_json: bool, text: str) -> None:
    if as_json or text:
        typer.echo(json.dumps(answer, indent=2) if as_json else text)
