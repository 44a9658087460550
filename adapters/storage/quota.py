"""How much the adapters of some names may take of a store."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from infuse.adapters.errors import QuotaExceeded
from infuse.adapters.storage.index import Index
from infuse.adapters.storage.revision import Revision


@dataclass(frozen=True, slots=True)
class Quota:
    """A limit that is None is not set."""

    covers: Callable[[str], bool]
    """Whether the adapter of a name counts."""
    adapters: int | None = None
    nbytes: int | None = None
    """The bytes of all their revisions; equal contents count once."""

    def check(self, index: Index, added: Revision, dropped: int) -> None:
        """Check that a revision may be added, as the oldest `dropped` of its name go. Raises
        QuotaExceeded."""
        held = index.reachable(self.covers)
        held[added.name] = [*held.get(added.name, [])[dropped:], added]
        if self.adapters is not None and len(held) > self.adapters:
            raise QuotaExceeded(f"{len(held)} adapters", f"{self.adapters}")
        if self.nbytes is not None:
            revisions = chain.from_iterable(held.values())
            nbytes = sum({each.digest: each.size for each in revisions}.values())
            if nbytes > self.nbytes:
                raise QuotaExceeded(f"{nbytes} bytes of adapters", f"{self.nbytes}")
