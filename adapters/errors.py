"""What can go wrong with an adapter.

AdapterError
├── InvalidAdapter       an upload that must not be served; carries every fault found
├── UnknownAdapter       no adapter of that name
├── UnknownRevision      the name exists, that revision of it does not
├── AdapterExists        the name is taken
├── RevisionConflict     the adapter changed since the caller last looked
├── AdapterDisabled      an operator has switched the adapter off
├── TooManyPinned        one more pinned adapter would leave no slot for the others
├── CannotCombine        whole modules cannot be mixed or weighted
├── CombinedNotFinite    weights so large that the result cannot be an adapter
├── CannotMerge          the base's files cannot be merged, or the result is not finite
├── NoFreeSlot           more adapters attached than the bank was made for
├── StoreLocked          another process owns the store's folder
└── StoreFull            the disk has no room left
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing wrong with an upload: where, what, and how to mend it."""

    field: str
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" + (f" ({self.fix})" if self.fix else "")


class AdapterError(Exception):
    """Root of everything that this package raises on purpose."""


class InvalidAdapter(AdapterError):
    def __init__(self, faults: Sequence[Fault]) -> None:
        assert faults, "an invalid adapter has at least one fault"
        self.faults = tuple(faults)
        super().__init__("; ".join(str(fault) for fault in self.faults))


class UnknownAdapter(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"There is no adapter named '{name}'.")


class UnknownRevision(AdapterError):
    def __init__(self, name: str, revision: int) -> None:
        self.name = name
        self.revision = revision
        super().__init__(f"The adapter '{name}' has no revision {revision}.")


class AdapterExists(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"An adapter named '{name}' exists already; replace it with PUT or delete it first."
        )


class RevisionConflict(AdapterError):
    def __init__(self, name: str, current: str) -> None:
        self.name = name
        self.current = current
        super().__init__(f"The adapter '{name}' has changed; its ETag is now {current}.")


class AdapterDisabled(AdapterError):
    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"The adapter '{name}' is disabled.")


class TooManyPinned(AdapterError):
    def __init__(self, most: int) -> None:
        super().__init__(
            f"{most} adapters are pinned already, and one slot must stay for the others: unpin "
            "one, or raise max-resident-adapters."
        )


class CannotCombine(AdapterError):
    def __init__(self, module: str) -> None:
        super().__init__(
            f"An adapter brings its own copy of {module}, which cannot be mixed or weighted; use "
            "that adapter alone."
        )


class CombinedNotFinite(AdapterError):
    def __init__(self, module: str) -> None:
        super().__init__(f"The combined vector of {module} is not finite; take smaller weights.")


class CannotMerge(AdapterError):
    pass


class NoFreeSlot(AdapterError):
    def __init__(self, capacity: int) -> None:
        super().__init__(
            f"All {capacity} adapter slots are taken; delete an adapter or raise max_adapters."
        )


class StoreLocked(AdapterError):
    pass


class StoreFull(AdapterError):
    pass
