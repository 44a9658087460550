"""The values that a store keeps of an adapter, and how its journal writes them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from adapters.storage.journal import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a revision comes from."""

    source: str = "upload"
    by: str | None = None
    """Who made the change: the name of a key."""
    recipe: Mapping[str, Any] | None = None
    """How it was combined out of others."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One state of an adapter. Numbers of a name are 1, 2, 3, … and are never used again."""

    name: str
    number: int
    digest: str
    """SHA-256 over the names and bytes of its files."""
    created: datetime
    size: int
    """Bytes of all files."""
    origin: Origin
    edits: int = field(default=0, compare=False)
    """How often the details of its name had been changed when the store gave this value out. It
    never falls while the name lives, and the journal gives it back after a restart."""

    @property
    def etag(self) -> str:
        """A quoted string, as HTTP wants it: another one after each change of the name, be it of
        the content or of the details."""
        edits = f".{self.edits}" if self.edits else ""
        return f'"{self.number}{edits}-{self.digest[:32]}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What an operator says of an adapter, beside its content."""

    description: str = ""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    """Keep it on the device."""
    enabled: bool = True
    """Answer requests that name it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailsChange:
    """What to change of an adapter's details; None leaves a detail as it is."""

    description: str | None = None
    tags: tuple[str, ...] | None = None
    pinned: bool | None = None
    enabled: bool | None = None

    def applied_to(self, details: Details) -> Details:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(details, **given)


def revision_to_json(revision: Revision) -> dict[str, object]:
    return {
        "number": revision.number,
        "digest": revision.digest,
        "created": revision.created.isoformat(),
        "size": revision.size,
        "source": revision.origin.source,
        "recipe": revision.origin.recipe,
    }


def revision_from_json(event: Event) -> Revision:
    return Revision(
        name=str(event["name"]),
        number=int(event["number"]),
        digest=str(event["digest"]),
        created=datetime.fromisoformat(str(event["created"])),
        size=int(event["size"]),
        origin=Origin(source=str(event["source"]), by=event["by"], recipe=event["recipe"]),
    )


def details_from_json(event: Event) -> Details:
    return Details(
        description=str(event["description"]),
        tags=tuple(map(str, event["tags"])),
        pinned=bool(event["pinned"]),
        enabled=bool(event["enabled"]),
    )
