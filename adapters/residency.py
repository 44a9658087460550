"""Residency: which vectors are in host memory, and which of them in a slot on the device."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.model.bank import BASE_SLOT
from infuse.adapters.vocabulary.vocabulary import Vocabulary


class SlotHolder(Protocol):
    """The device's slots, as `IA3Slots` has them. Only the model thread calls `fill_slot` and
    `clear_slot`."""

    @property
    def capacity(self) -> int:
        """The number of slots for adapters, 1 to `capacity`; slot 0 is the base."""
        ...

    @property
    def saved_capacity(self) -> int:
        """Bytes that the whole modules of all resident adapters may take."""
        ...

    def check(self, vectors: AdapterVectors) -> None:
        """Raises InvalidAdapter for vectors that no slot can hold."""

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None: ...

    def clear_slot(self, slot: int) -> None: ...


class Lease:
    """A lease keeps vectors in host memory from the first to the last moment of a request.

    The request finishes on them even if their adapter is replaced or deleted meanwhile.
    """

    def __init__(
        self,
        residency: "Residency",
        label: str,
        vectors: AdapterVectors,
        vocabulary: Vocabulary | None,
    ) -> None:
        """`Residency.lease` makes leases; nothing else does."""
        self.label = label
        """The leased revision, `name@revision`, or the mixture."""
        self.vectors = vectors
        self.vocabulary = vocabulary
        """The tokenizer and chat template; None for the base's."""
        self._residency = residency
        self._released = False

    def again(self) -> "Lease":
        """Return another lease on the same vectors."""
        assert not self._released
        return self._residency.lease(None, self.label, self.vectors, self.vocabulary)

    def release(self) -> None:
        """Give the lease back; a second time does nothing."""
        if not self._released:
            self._released = True
            self._residency.end_lease(self.vectors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


@dataclass(slots=True)
class _Content:
    """Vectors in host memory, and what uses them."""

    vectors: AdapterVectors
    keys: set[str] = field(default_factory=set)
    """The keys by which `Residency.find` finds the vectors."""
    leases: int = 0
    pins: int = 0
    kept: int = 0
    """How many adapters with this content an operator has pinned to the device."""
    slot: int | None = None
    label: str = ""
    """The latest lease's."""
    retired: bool = False
    """The adapter was deleted or replaced: the last lease that ends frees the slot."""


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    capacity: int
    """Slots for adapters on the device."""
    resident: int
    pinned: int
    """Slots that a running sequence uses."""
    leases: int
    swaps: int
    """How often a slot was filled."""
    saved_bytes: int
    """Bytes that the whole modules of resident adapters take on the device."""
    host_bytes: int
    """Bytes of host memory that vectors take which nothing uses."""


@dataclass(frozen=True, slots=True)
class SlotUse:
    """A slot of the device, and what uses it now."""

    slot: int
    label: str
    """The label of the latest lease on its vectors; "" where an operator pinned them."""
    pins: int
    """How many running sequences use it."""
    leases: int
    kept: bool
    """Whether an operator pinned it."""


class Residency:
    """Owns leases, pins and slots. Adapters with equal content share a slot.

    Any thread may lease; only the model thread pins, unpins and settles. Nothing here reads the
    disk. Resident vectors without a lease stay for the next request and are evicted, least recently
    used first, when a slot is needed. Evicted vectors stay in host memory, within a budget, so that
    the next request need not read them from the disk.
    """

    def __init__(self, slots: SlotHolder, host_bytes: int = 0) -> None:
        """`host_bytes`: how much host memory vectors may take that nothing uses."""
        self._slots = slots
        self._host_bytes = host_bytes
        self._mutex = threading.Lock()
        self._contents: dict[str, _Content] = {}
        """Digest of vectors -> the vectors, and what uses them."""
        self._by_key: dict[str, str] = {}
        """Key of a revision or mixture -> digest of its vectors, while they are in memory."""
        self._resident: OrderedDict[str, int] = OrderedDict()
        """Digest -> slot, least recently used first."""
        self._unused: OrderedDict[str, None] = OrderedDict()
        """Digests of vectors in host memory that nothing uses, least recently used first."""
        self._unused_bytes = 0
        self._free = list(range(slots.capacity, BASE_SLOT, -1))
        self._to_clear: list[int] = []
        """Free slots that still hold whole modules: the model thread clears them."""
        self._saved_bytes = 0
        """Bytes that the whole modules of resident adapters take."""
        self._leases = 0
        self._swaps = 0
        self._unsettled = False

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    def check(self, vectors: AdapterVectors) -> None:
        """Raises InvalidAdapter for vectors that no slot can hold."""
        self._slots.check(vectors)

    @property
    def host_capacity(self) -> int:
        """How many bytes of host memory vectors may take that nothing uses."""
        return self._host_bytes

    def find(self, key: str) -> AdapterVectors | None:
        """Return the vectors of a key, or None where they are not in memory."""
        with self._mutex:
            content = self._contents.get(self._by_key.get(key, ""))
            return None if content is None else content.vectors

    def lease(
        self,
        key: str | None,
        label: str,
        vectors: AdapterVectors,
        vocabulary: Vocabulary | None = None,
    ) -> Lease:
        """Lease vectors. `find` returns them for `key` as long as they are in memory."""
        digest = vectors.digest
        with self._mutex:
            content = self._enter(key, digest, vectors)
            content.leases += 1
            content.label = label
            content.retired = False
            self._leases += 1
            return Lease(self, label, content.vectors, vocabulary)

    def end_lease(self, vectors: AdapterVectors) -> None:
        """End a lease: `Lease.release` calls this."""
        with self._mutex:
            self._leases -= 1
            content = self._contents[vectors.digest]
            content.leases -= 1
            assert content.leases > 0 or content.pins == 0, "a pinned slot has a lease"
            self._after_use(content)

    def retire(self, key: str) -> None:
        """Mark a key's vectors as no longer current: the last lease that ends frees their slot."""
        with self._mutex:
            content = self._contents.get(self._by_key.get(key, ""))
            if content is not None:
                content.retired = True
                self._after_use(content)

    def keep(self, key: str, vectors: AdapterVectors) -> None:
        """Keep vectors in a slot from the next `settle` on, whether a request uses them or not."""
        digest = vectors.digest
        with self._mutex:
            self._enter(key, digest, vectors).kept += 1
            self._unsettled = True

    def stop_keeping(self, vectors: AdapterVectors) -> None:
        with self._mutex:
            content = self._contents[vectors.digest]
            content.kept -= 1
            self._after_use(content)

    def settle(self) -> None:
        """Clear the slots of evicted adapters, and fill slots for kept ones. Where all slots are in
        use, the next call tries again."""
        if not self._unsettled and not self._to_clear:
            return
        with self._mutex:
            self._clear()
            wanted = [c for c in self._contents.values() if c.kept] if self._unsettled else []
            absent = [c for c in wanted if c.slot is None and not c.vectors.is_base]
            filled = [self._fill(content, evict_kept=False) for content in absent]
            self._unsettled = not all(filled)

    def pin(self, lease: Lease) -> int | None:
        """Pin and return the slot of a lease's vectors, filled on first use.

        Returns None where pinned slots leave no slot free, or no room for the whole modules.
        """
        vectors = lease.vectors
        if vectors.is_base:
            return BASE_SLOT
        with self._mutex:
            content = self._contents[vectors.digest]
            if content.slot is None and not self._fill(content, evict_kept=True):
                return None
            content.pins += 1
            self._resident.move_to_end(vectors.digest)
            return content.slot

    def is_resident(self, lease: Lease) -> bool:
        """Whether a slot holds the lease's vectors, so that `pin` fills none."""
        with self._mutex:
            return lease.vectors.is_base or self._contents[lease.vectors.digest].slot is not None

    def unpin(self, lease: Lease) -> None:
        if lease.vectors.is_base:
            return
        with self._mutex:
            content = self._contents[lease.vectors.digest]
            assert content.pins > 0, "unpinned more often than pinned"
            content.pins -= 1

    def stats(self) -> ResidencyStats:
        with self._mutex:
            return ResidencyStats(
                capacity=self.capacity,
                resident=len(self._resident),
                pinned=sum(self._contents[digest].pins > 0 for digest in self._resident),
                leases=self._leases,
                swaps=self._swaps,
                saved_bytes=self._saved_bytes,
                host_bytes=self._unused_bytes,
            )

    def slots(self) -> list[SlotUse]:
        """The slots that are filled, the next one to be evicted first."""
        with self._mutex:
            return [
                SlotUse(slot, content.label, content.pins, content.leases, bool(content.kept))
                for digest, slot in self._resident.items()
                for content in [self._contents[digest]]
            ]

    def _enter(self, key: str | None, digest: str, vectors: AdapterVectors) -> _Content:
        """`digest` is the vectors'. Callers compute it before they take the mutex: the model thread
        would wait for it."""
        content = self._contents.setdefault(digest, _Content(vectors))
        self._take_from_unused(content)
        if key is not None:
            content.keys.add(key)
            self._by_key[key] = digest
        return content

    def _fill(self, content: _Content, evict_kept: bool) -> bool:
        """Fill a slot; False where no slot, or no room for whole modules, can be made free."""
        if not self._make_room(content.vectors.saved_bytes, evict_kept):
            return False
        self._clear()
        slot = self._free.pop()
        try:
            # Under the mutex: most copies take a few hundred kilobytes, and no other thread copies.
            self._slots.fill_slot(slot, content.vectors)
        except BaseException:
            self._free.append(slot)
            self._to_clear.append(slot)
            raise
        self._swaps += 1
        self._saved_bytes += content.vectors.saved_bytes
        content.slot = self._resident[content.vectors.digest] = slot
        return True

    def _make_room(self, saved_bytes: int, evict_kept: bool) -> bool:
        """Evict until there is a slot, and room for so many bytes of whole modules.

        `evict_kept`: where nothing else makes enough room, kept adapters are evicted too, so that
        every admitted sequence can run.
        """
        to_evict: list[_Content] = []
        if not self._free:
            first = next((content for content in self._idle() if not content.kept), None)
            if first is None:
                return False
            to_evict.append(first)
        excess = self._saved_bytes + saved_bytes - self._slots.saved_capacity
        excess -= sum(content.vectors.saved_bytes for content in to_evict)
        if excess > 0:
            for content in sorted(self._idle(), key=lambda content: content.kept > 0):
                may_evict = content.vectors.saved and (evict_kept or not content.kept)
                if excess > 0 and may_evict and content not in to_evict:
                    to_evict.append(content)
                    excess -= content.vectors.saved_bytes
        if excess > 0:
            return False
        for content in to_evict:
            self._evict(content)
            self._set_aside(content)
        return True

    def _idle(self) -> Iterator[_Content]:
        """Resident vectors that no running sequence uses, least recently used first."""
        for digest in self._resident:
            content = self._contents[digest]
            if not content.pins:
                yield content

    def _evict(self, content: _Content) -> None:
        slot = self._resident.pop(content.vectors.digest, None)
        if slot is not None:
            content.slot = None
            self._free.append(slot)
            if content.vectors.saved:
                self._saved_bytes -= content.vectors.saved_bytes
                self._to_clear.append(slot)

    def _clear(self) -> None:
        while self._to_clear:
            self._slots.clear_slot(self._to_clear.pop())

    def _after_use(self, content: _Content) -> None:
        if content.retired and not content.leases and not content.kept:
            self._evict(content)
        self._set_aside(content)

    def _set_aside(self, content: _Content) -> None:
        """Count vectors that nothing uses as unused, within their budget; forget retired ones."""
        if content.leases or content.kept or content.slot is not None:
            return
        if content.retired:
            self._forget(content)
            return
        self._take_from_unused(content)
        self._unused[content.vectors.digest] = None
        self._unused_bytes += content.vectors.nbytes
        while self._unused_bytes > self._host_bytes:
            self._forget(self._contents[next(iter(self._unused))])

    def _take_from_unused(self, content: _Content) -> None:
        """Take vectors out of the unused ones: something uses them again, or they are forgotten."""
        if content.vectors.digest in self._unused:
            del self._unused[content.vectors.digest]
            self._unused_bytes -= content.vectors.nbytes

    def _forget(self, content: _Content) -> None:
        self._take_from_unused(content)
        del self._contents[content.vectors.digest]
        for key in content.keys:
            self._by_key.pop(key, None)
