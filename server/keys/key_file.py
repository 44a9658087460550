"""The keys file: JSON, a list of entries, each with its name, roles and scope, and a key or the
claims of tokens."""

import fcntl
import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from infuse.adapters.storage.journal import sync
from infuse.server.keys.claims import ClaimPatterns
from infuse.server.keys.scope import Scope
from infuse.server.keys.secrets import HASH_PATTERN, ID_PATTERN

log = logging.getLogger(__name__)

Role = Literal["generate", "admin", "metrics"]
"""`metrics` may read `/metrics` and nothing else. `admin` may read them too, `generate` may not:
they show every key's requests."""
Entry = dict[str, Any]
"""A key as the file has it."""
_SECRETS = ("key", "id", "hash", "claims")
"""The fields that say what opens the server."""


class Key(BaseModel):
    """Keys of one name are one tenant: they share its limits and its caches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    key: SecretStr | None = Field(None, min_length=16)
    """In plain. None: `id` and `hash`, or `claims`, are there instead."""
    id: Annotated[str, StringConstraints(pattern=ID_PATTERN)] | None = None
    hash: Annotated[str, StringConstraints(pattern=HASH_PATTERN)] | None = None
    claims: ClaimPatterns | None = None
    """Tokens with such claims are this entry's. There is no key then."""
    roles: frozenset[Role] = Field(min_length=1)
    scope: Scope = Scope()
    expires: AwareDatetime | None = None

    @model_validator(mode="after")
    def _has_one_secret(self) -> Self:
        given = {name for name in _SECRETS if getattr(self, name) is not None}
        if given not in ({"key"}, {"id", "hash"}, {"claims"}):
            raise ValueError(
                "a key has an id and a hash, as `infuse keys create` writes them, or claims of "
                "tokens, or in plain a key"
            )
        return self

    @model_validator(mode="after")
    def _sees_the_metrics(self) -> Self:
        if "metrics" in self.roles and self.scope.is_tenants:
            raise ValueError(
                "the role metrics shows the requests of all keys: leave it out, or scope.adapters"
            )
        return self

    @property
    def has_expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


class BadKeysFile(Exception):
    """The keys file cannot be used; the message says why, without a key in it."""


def read_keys(path: Path) -> list[Key]:
    """Read the keys file for a start. Raises BadKeysFile."""
    keys = load_keys(path)
    if not keys:
        raise BadKeysFile(f"the keys file {path} holds no key; nobody could use the server")
    return keys


def load_keys(path: Path) -> list[Key]:
    """Read the keys file, in which all keys may have been revoked. Raises BadKeysFile."""
    content, mode = _read(path)
    keys = _parse(path, content)
    if mode & stat.S_IROTH:
        log.warning("The keys file %s can be read by every user of this machine.", path)
    plain = sorted({key.name for key in keys if key.key is not None})
    if plain:
        log.warning(
            "The keys file %s holds keys in plain (%s): `infuse keys rotate NAME --file %s` makes "
            "a new one, of which only a hash is kept.",
            path,
            ", ".join(plain),
            path,
        )
    return keys


def read_entries(path: Path) -> list[Entry]:
    """The keys as the file has them. Raises BadKeysFile."""
    content, _ = _read(path)
    _parse(path, content)
    return list(json.loads(content))


def _read(path: Path) -> tuple[bytes, int]:
    """The file's content and its mode."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise BadKeysFile(f"the keys file {path} cannot be read: {error.strerror}") from None


def _parse(path: Path, content: bytes) -> list[Key]:
    try:
        keys = TypeAdapter(list[Key]).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        problem = first["msg"].removeprefix("Value error, ")
        raise BadKeysFile(f"the keys file {path} is wrong at {where}: {problem}") from None
    ids = [key.id for key in keys if key.id is not None]
    for each in ids:
        if ids.count(each) > 1:
            raise BadKeysFile(f"the keys file {path} is wrong: two keys have the id {each}")
    return keys


@contextmanager
def edited(path: Path) -> Iterator[list[Entry]]:
    """Within: the keys to change; they are written at the end, unless it raises. One edit waits for
    another; readers see the file before or after. Keys that have expired are left out.

    Raises BadKeysFile.
    """
    path = path.resolve()
    try:
        with _locked(path.with_name(f".{path.name}.lock")):
            entries = read_entries(path) if path.exists() else []
            yield entries
            content = json.dumps([each for each in entries if not _has_expired(each)], indent=2)
            _parse(path, content.encode())
            _replace(path, f"{content}\n")
    except OSError as error:
        problem = f"{error.strerror}; write it where the server reads it from"
        raise BadKeysFile(f"the keys file {path} cannot be written: {problem}") from None


def _has_expired(entry: Entry) -> bool:
    return Key.model_validate(entry).has_expired


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: str) -> None:
    """Write the file anew for the same owner, and for nobody else to read. What an edit that was
    killed has left is removed."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.unlink(missing_ok=True)
    handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            if path.exists():
                before = path.stat()
                os.fchmod(handle, stat.S_IMODE(before.st_mode) & ~stat.S_IRWXO)
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(handle, before.st_uid, before.st_gid)
            file.write(content)
            file.flush()
            os.fsync(handle)
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink()
        raise
    sync(path.parent)
