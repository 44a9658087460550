"""Parse the URLs from which adapters are fetched, and the prefixes that an operator allows."""

import re
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

from infuse.adapters.errors import BadSource

Scheme = Literal["hf", "s3", "gs", "az", "file"]

_SHAPES: dict[Scheme, str] = {
    "hf": "hf://org/name@revision/folder",
    "s3": "s3://bucket/folder",
    "gs": "gs://bucket/folder",
    "az": "az://container/folder",
    "file": "file:///folder",
}
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_NO_ORGANISATIONS = {"api", "buckets", "datasets", "kernels", "models", "spaces"}
"""The first parts of the hub's own paths."""


@dataclass(frozen=True, slots=True)
class Source:
    """A parsed URL. A prefix may be shorter, down to the scheme alone."""

    scheme: Scheme
    path: tuple[str, ...]
    """hf: organisation, name, folders; s3, gs and az: bucket, folders; file: folders."""
    revision: str | None = None
    """hf only: a branch, tag or commit."""

    def __str__(self) -> str:
        parts = list(self.path)
        if self.revision is not None:
            parts[1] += f"@{self.revision}"
        return f"{self.scheme}://{'/' if self.scheme == 'file' else ''}{'/'.join(parts)}"

    def at(self, revision: str) -> "Source":
        return replace(self, revision=revision)

    def holds(self, other: "Source") -> bool:
        """Whether this prefix allows `other`. Whole parts are compared, never characters."""
        return self.scheme == other.scheme and self.path == other.path[: len(self.path)]


def parse_source(url: str) -> Source:
    """Parse the URL of an adapter. Raises BadSource."""
    scheme, parts = _split(url)
    revision = None
    if scheme == "hf" and len(parts) > 1:
        parts[1], at, revision_text = parts[1].partition("@")
        revision = revision_text if at else None
        if revision is not None and not _REVISION.fullmatch(revision):
            raise BadSource("has a revision that is no plain branch, tag or commit", _SHAPES["hf"])
    if len(parts) < (2 if scheme == "hf" else 1):
        raise BadSource("is too short to name an adapter", _SHAPES[scheme])
    _check(scheme, parts)
    return Source(scheme, tuple(parts), revision)


def parse_prefixes(text: str) -> tuple[Source, ...]:
    """Parse an operator's allowed prefixes, separated by commas. Raises BadSource."""
    prefixes = []
    for url in filter(None, map(str.strip, text.split(","))):
        scheme, parts = _split(url)
        _check(scheme, parts)
        prefixes.append(Source(scheme, tuple(parts)))
    return tuple(prefixes)


def _split(url: str) -> tuple[Scheme, list[str]]:
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in get_args(Scheme):
        raise BadSource(f"begins with none of {', '.join(f'{each}://' for each in _SHAPES)}")
    known = cast(Scheme, scheme)
    if known == "file":
        if not rest.startswith("/"):
            raise BadSource("names a host", _SHAPES["file"])
        rest = rest[1:]
    rest = rest.removesuffix("/")
    return known, rest.split("/") if rest else []


def _check(scheme: Scheme, parts: list[str]) -> None:
    """Refuse what could be read in two ways, so that each source has one spelling.

    The messages repeat nothing of the URL, which may contain a password.
    """
    shape = _SHAPES[scheme]
    for part in parts:
        if part in ("", ".", ".."):
            raise BadSource("has an empty part, '.' or '..'", shape)
        if not part.isprintable() or any(character in part for character in "%?#\\"):
            raise BadSource("has a control character, '%', '?', '#' or a backslash", shape)
    if scheme == "hf":
        if not all(_REPOSITORY.fullmatch(part) for part in parts[:2]):
            raise BadSource("has an organisation or name that cannot be the hub's", shape)
        if parts and parts[0] in _NO_ORGANISATIONS:
            raise BadSource("names no model repository", shape)
    elif scheme != "file" and parts and not _BUCKET.fullmatch(parts[0]):
        raise BadSource("has a bucket that cannot be one", shape)
