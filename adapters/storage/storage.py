"""Storage keeps a store's contents and journal, in a folder on disk or in a bucket."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from adapters.storage.journal import Event
from adapters.storage.revision import Revision


class Storage(Protocol):
    """The storage of one store. A change is durable when it returns; a failure leaves it whole or
    absent.

    Only one thread at a time changes the storage; any thread may call `staging` and `files`.
    """

    def read(self) -> list[Event]:
        """Return every event, oldest first. Called once, first of all."""
        ...

    def append(self, event: Mapping[str, object]) -> None:
        """Append an event. Where this raises, the event is not in the journal, or `settle` later
        returns it."""
        ...

    def settle(self) -> Sequence[Event]:
        """Return the event of an append that raised, if it is in the journal after all. Called
        before each change. Raises what `check` raises."""
        ...

    def check(self) -> None:
        """Raises StoreUnreachable where it is known that no change would last."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private local folder to write files in; it is removed afterwards."""
        ...

    def keep(self, staged: Path, digest: str) -> bool:
        """Keep the staged files as the content of this digest, instead of damaged ones if there are
        any. False where the content was there. May move the staged folder."""
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

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove all other contents, which crashes have left. Called once, after `read`."""
        ...

    def close(self) -> None: ...
