"""The config file: settings in TOML, and what is said of names that are none."""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, TomlConfigSettingsSource

CONFIG_FILE = Path("infuse.toml")
"""Is read where it is there and `--config` names no other."""
OTHER_VARIABLES = ("URL", "API_KEY", "CACHE_DIR", "IA3_ADAPTERS", "SERVER_PID")
"""Environment variables of ours that are no settings, without their prefix."""


class BadConfigFile(ValueError):
    """A config file cannot be read, or sets what is no setting, or a value that it cannot have."""


class ConfigFile(TomlConfigSettingsSource):
    """The settings of the config file. A key is a flag without its dashes in front."""

    def __call__(self) -> dict[str, Any]:
        """Raises BadConfigFile."""
        # Flags and environment variables were read before.
        named = self.current_state.get("config")
        path = CONFIG_FILE if named is None else Path(named)
        if named is None and not path.exists():
            return {}
        try:
            given = self._read_file(path)
        except (OSError, ValueError) as error:
            raise BadConfigFile(f"{path} cannot be read: {error}") from None
        fields = {flag_of(name): name for name in self.settings_cls.model_fields}
        del fields["config"]
        for key in given:
            if key not in fields:
                raise BadConfigFile(f"{path}: '{key}' is no setting{_nearest(key, fields)}")
            self._check(path, key, fields[key], given[key])
        return {fields[key]: value for key, value in given.items()}

    def _check(self, path: Path, key: str, name: str, value: object) -> None:
        """Check a value here, where it is known to be the file's."""
        field = self.settings_cls.model_fields[name]
        kind: Any = Annotated[field.annotation, field]
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            raise BadConfigFile(f"{path}: {key}: {reason_of(error.errors()[0])}") from None


def reason_of(error: ErrorDetails) -> str:
    """Why a value was refused, in pydantic's words or ours."""
    return error["msg"].removeprefix("Value error, ")


def flag_of(name: str) -> str:
    """A setting's name as a flag, without the dashes in front."""
    return name.replace("_", "-")


def _nearest(name: str, known: Collection[str], prefix: str = "") -> str:
    """Ask whether another name was meant, where one is close."""
    close = get_close_matches(name, known, 1)
    return "".join(f"; did you mean '{prefix}{each}'?" for each in close)


def unknown_variables(kind: type[BaseSettings], environment: Mapping[str, str]) -> Iterator[str]:
    """Say of each variable with our prefix that it is none of ours."""
    prefix = kind.model_config["env_prefix"]
    known = {name.upper() for name in (*kind.model_fields, *OTHER_VARIABLES)}
    for variable in sorted(environment):
        name = variable.upper().removeprefix(prefix)
        if name != variable.upper() and name not in known:
            close = _nearest(name, known, prefix)
            yield f"The environment variable {variable} sets nothing{close}"
