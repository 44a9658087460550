"""Storage keeps a store's contents and journal, in a folder on disk or in a bucket."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.replicas import Replicas
from infuse.adapters.storage.revision import Revision


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of content that a storage was to keep."""

    is_new: bool
    """False where the content was there, undamaged."""
    record: Mapping[str, object]
    """What the event of a revision with this content says about where it is."""


class Storage(Protocol):
    """The storage of one store. A change is durable when it returns; a failure leaves it whole or
    absent.

    Only one thread at a time changes the storage, and one at a time reads or appends events; any
    thread may call `staging` and `files`.
    """

    @property
    def replicas(self) -> Replicas | None:
        """The servers that share the storage; None where one alone owns it."""
        ...

    @property
    def last(self) -> int:
        """The number of the last event that was read or appended. Numbers only grow."""
        ...

    def read(self) -> list[Event]:
        """Return every event that was not returned before, oldest first. Called first of all, and
        again where this server was away."""
        ...

    def append(self, event: Mapping[str, object]) -> None:
        """Append an event. Where this raises, the event is not in the journal, or `settle` later
        returns it. Raises Overtaken where there is an event that was not read."""
        ...

    def settle(self) -> Sequence[Event]:
        """Return what was not returned before: the event of an append that raised, if it is in the
        journal after all, and events of other servers. Called before each change. Raises what
        `check` raises."""
        ...

    def turn(self) -> AbstractContextManager[object]:
        """Held through a change: keeps other servers from changes where the storage can do that."""
        ...

    def check(self) -> None:
        """Raises StoreUnreachable where it is known that no change would last."""
        ...

    @property
    def is_read_only(self) -> bool:
        """Whether what is stored can be read and not changed, as far as was noticed."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private local folder to write files in; it is removed afterwards."""
        ...

    def keep(self, staged: Path, digest: str, in_use: bool) -> Kept:
        """Keep the staged files as the content of this digest, instead of damaged ones if there are
        any. `in_use`: whether a reachable revision has it. May move the staged folder, unless
        `append` may raise Overtaken."""
        ...

    def files(self, revision: Revision) -> Path:
        """Return the local folder of a revision's files, which is gone once they are removed."""
        ...

    def refresh(self, revision: Revision) -> None:
        """Fetch damaged files again where there is another copy. Raises StoreDamaged where that is
        damaged too."""
        ...

    def remove(self, digests: Iterable[str]) -> None:
        """Remove contents. Never raises: `keep_only` removes what cannot be removed now."""
        ...

    def forget(self, digests: Iterable[str]) -> None:
        """Remove copies of contents, which another server removes."""
        ...

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove all other contents, which crashes have left. Called once, after `read`."""
        ...

    def close(self) -> None: ...
