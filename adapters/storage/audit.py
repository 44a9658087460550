"""The audit trail: who changed which adapter when, and whether the journal is as it was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

from infuse.adapters.storage.chain import Entry, follow
from infuse.adapters.storage.outside import opened


@dataclass(frozen=True, slots=True)
class Audit:
    """What is known of a journal."""

    entries: Sequence[Entry]
    head: str
    """The digest of the journal."""
    unchained: int
    """How many events a release before the chain wrote, before the first chained one."""
    faults: Sequence[str]
    """What somebody has changed, or may have."""


def entries_of(store: Path | str) -> list[Entry]:
    """Read the journal of a store, which servers may use meanwhile. Raises BackupRefused where
    there is none."""
    with opened(store) as outside:
        return list(follow(outside.lines()))


def audit(store: Path | str, head: str | None = None) -> Audit:
    """Check the chain of a store's journal. `head`: its digest at an earlier time, kept elsewhere:
    everything up to then must be there, and stands."""
    entries = entries_of(store)
    known = next((each.number for each in entries if each.digest == head), 0)
    chained = list(dropwhile(lambda each: not each.is_chained, entries))
    faults = [fault for each in chained if (fault := _fault(each, known))]
    if head is not None and not known:
        faults.append(
            f"The journal was never at {head}: events up to then were changed or cut off, or this "
            "is another journal."
        )
    digest = entries[-1].digest if entries else ""
    return Audit(entries, digest, len(entries) - len(chained), faults)


def _fault(entry: Entry, known: int) -> str:
    """`known`: up to which event the journal is known to be as it was."""
    if entry.is_broken:
        return (
            f"Event {entry.number} does not follow event {entry.number - 1}: one of them was "
            "changed, or others were removed, added or moved there."
        )
    if entry.number <= known:
        return ""
    if entry.event is None:
        return f"Event {entry.number} cannot be read."
    if not entry.is_chained:
        return (
            f"Event {entry.number} is not chained: an older release has written it, or somebody "
            "else has."
        )
    return ""
