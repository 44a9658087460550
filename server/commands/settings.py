"""Reads the settings of `infuse serve`, `deploy` and `warm`, and writes their help."""

import inspect
import logging
import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, TomlConfigSettingsSource

from infuse.server.config_file import (
    CONFIG_FILE,
    BadConfigFile,
    flag_of,
    reason_of,
    unknown_variables,
)
from infuse.server.observability import logs
from infuse.server.on_ray.settings import DeploySettings
from infuse.server.settings import MEBIBYTE, Settings

log = logging.getLogger(__name__)

GROUPS = {
    "model": "The model",
    "adapters_dir": "Where things are kept",
    "host": "The address",
    "device": "How it computes",
    "max_queue": "Limits of requests",
    "source_prefixes": "Published adapters",
    "keys_file": "Who may do what",
    "drain_timeout": "The process and its log",
    "pack_linears": "Speed",
    "replicas": "Replicas",
}
"""The first setting of each group -> the group's title. A group ends where the next begins."""
_S = TypeVar("_S", bound=Settings)
_VALUES = {"str": "TEXT", "int": "N", "float": "N", "Path": "PATH", "{Path,str}": "PATH"}
"""What stands for a flag's value in the help."""
_SECONDS = ("_seconds", "_timeout", "_lease")


def read_settings(command: str, arguments: list[str], kind: type[_S]) -> _S:
    """Read settings from flags, environment and config file, and set up the log. What is wrong with
    them ends the command."""
    flags = _flags(command, kind)
    try:
        settings = CliApp.run(kind, arguments, flags)
    except BadConfigFile as error:
        typer.echo(f"infuse {command}: {error}", err=True)
        raise typer.Exit(2) from None
    except ValidationError as error:
        for each in error.errors():
            where = _given_by(str(each["loc"][0]), flags) if each["loc"] else "settings"
            typer.echo(f"infuse {command}: {where}: {reason_of(each)}", err=True)
        raise typer.Exit(2) from None
    logs.set_up(settings.log_level, settings.log_format)
    for said in unknown_variables(DeploySettings, os.environ):
        log.warning(said)
    return settings


def _given_by(name: str, flags: CliSettingsSource[ArgumentParser]) -> str:
    """The flag or the variable that gave a setting its value: the config file checks its own."""
    return f"--{flag_of(name)}" if name in flags() else f"INFUSE_{name.upper()}"


def from_file(key: str, default: str) -> Callable[[], str]:
    """What other commands take for a setting that neither a flag nor a variable gives: the config
    file's, as the server would."""

    def read() -> str:
        path = os.environ.get("INFUSE_CONFIG") or CONFIG_FILE
        try:
            return str(TomlConfigSettingsSource(Settings, path)().get(key, default))
        except (OSError, ValueError) as error:
            raise typer.BadParameter(f"{path} cannot be read: {error}") from None

    return read


def grouped(kind: type[Settings]) -> dict[str, list[str]]:
    """The names of the settings under the title of their group; "" for those before any."""
    groups: dict[str, list[str]] = {"": []}
    title = ""
    for name in kind.model_fields:
        title = GROUPS.get(name, title)
        groups.setdefault(title, []).append(name)
    return groups


def in_words(name: str, default: Any) -> str:
    """A setting's default for people; empty where its description tells it."""
    match default:
        case None | "":
            return ""
        case bool():
            return "on" if default else "off"
        case int() if name.endswith("_bytes"):
            return f"{default // MEBIBYTE} MiB"
        case float() if name.endswith(_SECONDS):
            return f"{default:g} s"
        case _:
            return str(default)


def _flags(command: str, kind: type[_S]) -> CliSettingsSource[ArgumentParser]:
    """The source of settings that reads flags, with a help of ours."""
    parser = ArgumentParser(
        prog=f"infuse {command}",
        usage=f"infuse {command} [--SETTING VALUE] ...",
        description=inspect.cleandoc(kind.__doc__ or ""),
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sections: dict[str, Any] = {}
    for title, names in grouped(kind).items():
        section = parser.add_argument_group(title) if title else parser
        sections |= dict.fromkeys(names, section)

    def add(_: Any, *flags: str, **how: Any) -> None:
        name, field = how["dest"], kind.model_fields[how["dest"]]
        words = in_words(name, field.default)
        text = f"{field.description} (default: {words})" if words else field.description or ""
        how["help"] = text.replace("%", "%%")
        if "metavar" in how:
            how["metavar"] = _VALUES.get(how["metavar"], how["metavar"])
        sections[name].add_argument(*flags, **how)

    return CliSettingsSource(kind, root_parser=parser, add_argument_method=add)
