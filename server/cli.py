"""The command line: `infuse serve`, `infuse deploy` and `infuse warm`; the other commands are in
`server/commands/`."""

import logging
import os
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from infuse.adapters.errors import AdapterError
from infuse.server import openmp
from infuse.server.commands.adapters import adapters_app
from infuse.server.commands.chat import chat
from infuse.server.commands.keys import keys_app
from infuse.server.commands.merge import merge
from infuse.server.commands.merges import merges_app
from infuse.server.commands.settings import read_settings
from infuse.server.commands.signing import sign, verify
from infuse.server.commands.stores import audit_app, backup, restore
from infuse.server.observability import logs
from infuse.server.on_ray.settings import DeploySettings
from infuse.server.settings import Settings
from infuse.server.version import own_version

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve many IA3 adapters on one base model.",
)
_PASSED_ON: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For commands whose options are settings, which pydantic reads."""
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


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"infuse {own_version()}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    pass


@app.command(
    context_settings=_PASSED_ON | {"help_option_names": []},
    help="Serve a model. `infuse serve --help` lists every setting.",
)
def serve(context: typer.Context) -> None:
    settings = read_settings("serve", context.args, Settings)
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
    settings = read_settings("deploy", context.args, DeploySettings)
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
    settings = read_settings("warm", ["--compile", *context.args], Settings)
    from infuse.server.app import warm_up
    from infuse.server.engine import EngineError

    try:
        compiled = warm_up(settings)
    except (EngineError, AdapterError, OSError) as error:
        _refuse(str(error), "warm")
    if not compiled:
        raise typer.Exit(1)
    typer.echo("The model is compiled")


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


app.command()(chat)
app.add_typer(adapters_app, name="adapters")
adapters_app.command()(sign)
adapters_app.command()(verify)
app.command()(merge)
app.add_typer(merges_app, name="merges")
app.add_typer(keys_app, name="keys")
app.command()(backup)
app.command()(restore)
app.add_typer(audit_app, name="audit")
