"""The values that a store keeps for an adapter, and their JSON in the journal."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any

from infuse.adapters.storage.chain import Event

_DIGEST = re.compile("[0-9a-f]{64}")
"""A content's folder is named by its digest, so that nothing else may pass for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How a revision was made."""

    source: str = "upload"
    by: str | None = None
    """The name of the API key that made the change."""
    signer: str | None = None
    """Who has signed the files; None where nobody asked."""
    recipe: Mapping[str, Any] | None = None
    """The recipe of an adapter that was combined of others."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One state of an adapter. Numbers of a name are 1, 2, 3, … and are never used again."""

    name: str
    number: int
    digest: str
    """The SHA-256 over the names and bytes of its files."""
    created: datetime
    size: int
    """The size of all files in bytes."""
    origin: Origin
    edits: int = field(default=0, compare=False)
    """How often the name's details were changed before the store returned this value. It only grows
    while the name exists, also over restarts."""

    @property
    def etag(self) -> str:
        """The ETag, quoted as in HTTP: it differs after each change of content or details."""
        edits = f".{self.edits}" if self.edits else ""
        return f'"{self.number}{edits}-{self.digest[:32]}"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What an operator sets for an adapter, besides its content."""

    description: str = ""
    tags: tuple[str, ...] = ()
    pinned: bool = False
    """Whether the adapter is kept on the device."""
    enabled: bool = True
    """Whether requests may use the adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DetailsChange:
    """A change of an adapter's details; None leaves a detail as it is."""

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
        "signer": revision.origin.signer,
        "recipe": revision.origin.recipe,
    }


def revision_from_json(event: Event) -> Revision:
    """Raises ValueError, KeyError, TypeError or OverflowError for what `revision_to_json` has not
    written."""
    if not _DIGEST.fullmatch(str(event["digest"])):
        raise ValueError(f"{event['digest']!r} is no digest")
    return Revision(
        name=str(event["name"]),
        number=int(event["number"]),
        digest=str(event["digest"]),
        created=datetime.fromisoformat(str(event["created"])),
        size=int(event["size"]),
        origin=Origin(
            source=str(event["source"]),
            by=event["by"],
            # Earlier releases have not written it.
            signer=event.get("signer"),
            recipe=event["recipe"],
        ),
    )


def details_from_json(event: Event) -> Details:
    return Details(
        description=str(event["description"]),
        tags=tuple(map(str, event["tags"])),
        pinned=bool(event["pinned"]),
        enabled=bool(event["enabled"]),
    )
