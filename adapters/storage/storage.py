"""What a store keeps its contents and its journal in: a folder on disk, or a bucket."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from adapters.storage.journal import Event
from adapters.storage.revision import Revision


class Storage(Protocol):
    """Owned by one store. Whatever returned is durable, and whole or absent after any failure.

    Only one thread at a time changes it; `staging` and `files` are for any thread.
    """

    def read(self) -> list[Event]:
        """Every event, oldest first. Called once, before all else."""
        ...

    def append(self, event: Mapping[str, object]) -> None:
        """Where this raises, the event has not happened, or `settle` says later that it has."""
        ...

    def settle(self) -> Sequence[Event]:
        """Called before each change: what an append that raised has done after all. Raises what
        `check` raises."""
        ...

    def check(self) -> None:
        """Raises StoreUnreachable where it can be told that no change would last."""
        ...

    def staging(self) -> AbstractContextManager[Path]:
        """A private local folder to write files in; gone afterwards."""
        ...

    def keep(self, staged: Path, digest: str) -> bool:
        """Keep the staged files as the content of this digest, also in the place of a damaged one.
        False where that content was there. The staged folder may be moved."""
        ...

    def files(self, revision: Revision) -> Path:
        """The local folder of a revision's files; it does not exist once they are removed."""
        ...

    def refresh(self, revision: Revision) -> None:
        """What `files` names is damaged: get it again where it is kept elsewhere too. Raises
        StoreDamaged where it is damaged there as well."""
        ...

    def remove(self, digests: Iterable[str]) -> None:
        """Never fails: what cannot be removed now is removed by `keep_only`."""
        ...

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove all other contents: what crashes have left behind. Called once, after `read`."""
        ...

    def close(self) -> None: ...
