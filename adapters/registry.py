"""Which adapter a request gets (name -> revision), and where its vectors are (content -> slot)."""

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from adapters.bank import BASE_SLOT
from adapters.checkpoint import (
    AdapterVectors,
    base_mismatch_warning,
    effective_vectors,
    read_checkpoint,
)
from adapters.errors import AdapterExists, InvalidAdapter, UnknownAdapter
from adapters.store import AdapterStore, Revision, check_name
from adapters.targets import BaseModules


class SlotHolder(Protocol):
    """What holds the vectors on the device: `IA3Model`. Called on the model thread only."""

    @property
    def capacity(self) -> int:
        """Slots are 1 to `capacity`; slot 0 is the base."""
        ...

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None: ...


class Lease:
    """Keeps one revision's vectors alive from the first to the last moment of a request.

    Whatever happens to its name meanwhile, the request finishes on this revision.
    """

    def __init__(
        self, registry: "AdapterRegistry", revision: Revision, vectors: AdapterVectors
    ) -> None:
        self.revision = revision
        self.vectors = vectors
        self._registry = registry
        self._released = False

    @property
    def name(self) -> str:
        return self.revision.name

    def release(self) -> None:
        """Give the lease back; a second time does nothing."""
        if not self._released:
            self._released = True
            self._registry._end_lease(self.vectors.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True)
class RegistryStats:
    registered: int
    resident: int
    pinned: int
    """Slots that a running row uses."""
    leases: int
    swaps: int
    """How many times a slot was filled."""


@dataclass(slots=True)
class _Content:
    """One effective vector set that is leased or resident."""

    vectors: AdapterVectors
    leases: int = 0
    pins: int = 0
    slot: int | None = None
    retired: bool = False
    """Its adapter was deleted or replaced: the slot goes with the last lease."""


class AdapterRegistry:
    """Owns leases, pins and slots. Slots go by content: adapters that do the same share one.

    Any thread may lease, add, replace and delete; only the model thread pins and unpins. The disk
    is never read while the lock is held that `pin` takes. Resident vectors without a lease stay
    for the next request and are evicted, least recently used first, when a slot is needed.
    """

    def __init__(
        self,
        store: AdapterStore,
        modules: BaseModules,
        slots: SlotHolder,
        reserved: Collection[str] = (),
    ) -> None:
        """`reserved`: names that no adapter may take, the base's; the first of them is the one
        that is served."""
        self._store = store
        self._modules = modules
        self._slots = slots
        self._reserved = tuple(reserved)
        self._mutex = threading.Lock()
        self._contents: dict[str, _Content] = {}
        self._loaded: dict[str, str] = {}
        """Store digest -> effective digest, of contents that are in memory."""
        self._resident: OrderedDict[str, int] = OrderedDict()
        """Effective digest -> slot, least recently used first."""
        self._free = list(range(slots.capacity, BASE_SLOT, -1))
        self._leases = 0
        self._swaps = 0

    def check(self, staged: Path) -> tuple[AdapterVectors, list[str]]:
        """Everything that an upload must pass, and warnings. Raises InvalidAdapter."""
        checkpoint = read_checkpoint(staged)
        vectors = effective_vectors(checkpoint, self._modules)
        served = self._reserved[0] if self._reserved else ""
        warning = base_mismatch_warning(checkpoint.config, served) if served else None
        return vectors, [] if warning is None else [warning]

    def check_name(self, name: str) -> None:
        """Raises InvalidAdapter for what is no name, AdapterExists for the base's own."""
        if name in self._reserved:
            raise AdapterExists(name)
        check_name(name)

    def add(self, name: str, staged: Path, source: str = "upload") -> tuple[Revision, list[str]]:
        """Raises InvalidAdapter, AdapterExists, StoreFull."""
        self.check_name(name)
        _, warnings = self.check(staged)
        return self._store.create(name, staged, source), warnings

    def replace(
        self, name: str, staged: Path, if_match: str | None = None, source: str = "upload"
    ) -> tuple[Revision, bool, list[str]]:
        """The revision, whether it is new, and warnings.

        Raises UnknownAdapter, RevisionConflict, InvalidAdapter, StoreFull.
        """
        old = self._store.current(name)
        _, warnings = self.check(staged)
        revision, changed = self._store.replace(name, staged, if_match, source)
        if changed:
            self._retire(old)
        return revision, changed, warnings

    def delete(self, name: str, if_match: str | None = None) -> None:
        """Running requests finish; new ones do not find it. Raises UnknownAdapter,
        RevisionConflict."""
        old = self._store.current(name)
        self._store.delete(name, if_match)
        self._retire(old)

    def lease(self, model: str) -> Lease:
        """A lease on what `name` is now, or on `name@number`. May read the disk.

        Raises UnknownAdapter, UnknownRevision.
        """
        name, at, number = model.partition("@")
        if not at:
            revision = self._store.current(name)
        elif number.isascii() and number.isdigit() and len(number) < 10:
            revision = self._store.revision(name, int(number))
        else:
            raise UnknownAdapter(model)
        with self._mutex:
            content = self._contents.get(self._loaded.get(revision.digest, ""))
            if content is not None:
                return self._begin_lease(revision, content.vectors)
        vectors = self._load(revision)
        with self._mutex:
            self._loaded[revision.digest] = vectors.digest
            return self._begin_lease(revision, vectors)

    def pin(self, lease: Lease) -> int | None:
        """The slot of a lease's vectors, filled on first use; None where every slot is pinned."""
        vectors = lease.vectors
        if not vectors.vectors:
            return BASE_SLOT
        with self._mutex:
            content = self._contents[vectors.digest]
            if content.slot is None:
                slot = self._take_slot()
                if slot is None:
                    return None
                # A few hundred kilobytes from host memory, and only this thread uses slots.
                try:
                    self._slots.fill_slot(slot, vectors)
                except BaseException:
                    self._free.append(slot)
                    raise
                self._swaps += 1
                content.slot = self._resident[vectors.digest] = slot
            content.pins += 1
            self._resident.move_to_end(vectors.digest)
            return content.slot

    def unpin(self, lease: Lease) -> None:
        if not lease.vectors.vectors:
            return
        with self._mutex:
            content = self._contents[lease.vectors.digest]
            assert content.pins > 0, "unpinned more often than pinned"
            content.pins -= 1

    def stats(self) -> RegistryStats:
        with self._mutex:
            return RegistryStats(
                registered=len(self._store),
                resident=len(self._resident),
                pinned=sum(self._contents[digest].pins > 0 for digest in self._resident),
                leases=self._leases,
                swaps=self._swaps,
            )

    def _load(self, revision: Revision) -> AdapterVectors:
        try:
            checkpoint = read_checkpoint(self._store.files(revision))
        except (OSError, InvalidAdapter):
            # Deleted since its name was looked up: say what a request one moment later hears.
            self._store.revision(revision.name, revision.number)
            raise
        return effective_vectors(checkpoint, self._modules)

    def _begin_lease(self, revision: Revision, vectors: AdapterVectors) -> Lease:
        content = self._contents.setdefault(vectors.digest, _Content(vectors))
        content.leases += 1
        content.retired = False
        self._leases += 1
        return Lease(self, revision, content.vectors)

    def _end_lease(self, digest: str) -> None:
        with self._mutex:
            self._leases -= 1
            content = self._contents[digest]
            content.leases -= 1
            assert content.leases > 0 or content.pins == 0, "a pinned slot has a lease"
            if content.retired and content.leases == 0:
                self._free_slot(digest)
            self._forget_unused(digest)

    def _retire(self, revision: Revision) -> None:
        with self._mutex:
            digest = self._loaded.get(revision.digest)
            if digest is None:
                return
            self._contents[digest].retired = True
            if self._contents[digest].leases == 0:
                self._free_slot(digest)
            self._forget_unused(digest)

    def _take_slot(self) -> int | None:
        if not self._free:
            unpinned = (d for d in self._resident if self._contents[d].pins == 0)
            digest = next(unpinned, None)
            if digest is None:
                return None
            self._free_slot(digest)
            self._forget_unused(digest)
        return self._free.pop()

    def _free_slot(self, digest: str) -> None:
        slot = self._resident.pop(digest, None)
        if slot is not None:
            self._contents[digest].slot = None
            self._free.append(slot)

    def _forget_unused(self, digest: str) -> None:
        """Host copies live as long as a lease or a slot."""
        content = self._contents[digest]
        if content.leases == 0 and content.slot is None:
            del self._contents[digest]
            self._loaded = {k: v for k, v in self._loaded.items() if v != digest}
