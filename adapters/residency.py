"""Which vectors are in host memory and which of them in a slot on the device: leases and pins."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from adapters.checkpoint.checkpoint import AdapterVectors
from adapters.model.bank import BASE_SLOT
from adapters.vocabulary.vocabulary import Vocabulary


class SlotHolder(Protocol):
    """What holds the vectors on the device: `IA3Slots`. Called on the model thread only."""

    @property
    def capacity(self) -> int:
        """Slots are 1 to `capacity`; slot 0 is the base."""
        ...

    @property
    def saved_capacity(self) -> int:
        """Bytes that the whole modules of all resident adapters may take."""
        ...

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None: ...

    def clear_slot(self, slot: int) -> None: ...


class Lease:
    """Keeps vectors alive from the first to the last moment of a request.

    Whatever happens to their adapters meanwhile, the request finishes on them.
    """

    def __init__(
        self,
        residency: "Residency",
        label: str,
        vectors: AdapterVectors,
        vocabulary: Vocabulary | None,
    ) -> None:
        """Made by `Residency.lease`."""
        self.label = label
        """What was leased: `name@revision`, or how several were mixed."""
        self.vectors = vectors
        self.vocabulary = vocabulary
        """None: the base's."""
        self._residency = residency
        self._released = False

    def again(self) -> "Lease":
        """Another lease on the same vectors."""
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
    """One effective vector set that is leased, kept or resident."""

    vectors: AdapterVectors
    keys: set[str] = field(default_factory=set)
    """What resolves to it while it is in memory."""
    leases: int = 0
    pins: int = 0
    kept: int = 0
    """How many names an operator keeps on the device with this content."""
    slot: int | None = None
    retired: bool = False
    """Its adapter was deleted or replaced: the slot goes with the last lease."""


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    resident: int
    pinned: int
    """Slots that a running row uses."""
    leases: int
    swaps: int
    """How many times a slot was filled."""
    saved_bytes: int
    """Of the whole modules of resident adapters."""
    host_bytes: int
    """Of vectors in host memory that nothing uses."""


class Residency:
    """Owns leases, pins and slots. Slots go by content: adapters that do the same share one.

    Any thread may lease; only the model thread pins, unpins and settles. Nothing here reads the
    disk. Resident vectors without a lease stay for the next request and are evicted, least recently
    used first, when a slot is needed. They stay in host memory even then, within a budget: what is
    asked for again is not read again.
    """

    def __init__(self, slots: SlotHolder, host_bytes: int = 0) -> None:
        """`host_bytes`: for vectors that nothing uses."""
        self._slots = slots
        self._host_bytes = host_bytes
        self._mutex = threading.Lock()
        self._contents: dict[str, _Content] = {}
        """By the digest of the vectors."""
        self._by_key: dict[str, str] = {}
        """Key of a leased thing -> digest of its vectors, while they are in memory."""
        self._resident: OrderedDict[str, int] = OrderedDict()
        """Digest -> slot, least recently used first."""
        self._unused: OrderedDict[str, None] = OrderedDict()
        """Digests of what is in host memory only, without a lease: least recently used first."""
        self._unused_bytes = 0
        self._free = list(range(slots.capacity, BASE_SLOT, -1))
        self._to_clear: list[int] = []
        """Free slots that still hold whole modules, until the model thread comes by."""
        self._saved_bytes = 0
        """Of the whole modules of all that is resident."""
        self._leases = 0
        self._swaps = 0
        self._unsettled = False

    @property
    def capacity(self) -> int:
        return self._slots.capacity

    @property
    def saved_capacity(self) -> int:
        return self._slots.saved_capacity

    @property
    def host_capacity(self) -> int:
        """Bytes of host memory for vectors that nothing uses."""
        return self._host_bytes

    def find(self, key: str) -> AdapterVectors | None:
        """The vectors of a key, where they are in memory."""
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
        """`key` names the vectors for `find` as long as they are in memory."""
        digest = vectors.digest
        with self._mutex:
            content = self._enter(key, digest, vectors)
            content.leases += 1
            content.retired = False
            self._leases += 1
            return Lease(self, label, content.vectors, vocabulary)

    def end_lease(self, vectors: AdapterVectors) -> None:
        """Called by `Lease.release`."""
        with self._mutex:
            self._leases -= 1
            content = self._contents[vectors.digest]
            content.leases -= 1
            assert content.leases > 0 or content.pins == 0, "a pinned slot has a lease"
            self._let_go(content)

    def retire(self, key: str) -> None:
        """New requests will not ask for a key's vectors: their slot goes with the last lease."""
        with self._mutex:
            content = self._contents.get(self._by_key.get(key, ""))
            if content is not None:
                content.retired = True
                self._let_go(content)

    def keep(self, key: str, vectors: AdapterVectors) -> None:
        """Hold vectors in a slot from the next step on, whether they are used or not."""
        digest = vectors.digest
        with self._mutex:
            self._enter(key, digest, vectors).kept += 1
            self._unsettled = True

    def stop_keeping(self, vectors: AdapterVectors) -> None:
        with self._mutex:
            content = self._contents[vectors.digest]
            content.kept -= 1
            self._let_go(content)

    def settle(self) -> None:
        """Free what was evicted, and fill slots for what is kept; what finds them all in use is
        tried again next time."""
        if not self._unsettled and not self._to_clear:
            return
        with self._mutex:
            self._clear()
            wanted = [c for c in self._contents.values() if c.kept] if self._unsettled else []
            absent = [c for c in wanted if c.slot is None and not c.vectors.is_base]
            filled = [self._fill(content, evict_kept=False) for content in absent]
            self._unsettled = not all(filled)

    def pin(self, lease: Lease) -> int | None:
        """The slot of a lease's vectors, filled on first use; None where pinned ones leave no slot,
        or no room for its whole modules."""
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
        """Whether `pin` finds a slot with the lease's vectors."""
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
                resident=len(self._resident),
                pinned=sum(self._contents[digest].pins > 0 for digest in self._resident),
                leases=self._leases,
                swaps=self._swaps,
                saved_bytes=self._saved_bytes,
                host_bytes=self._unused_bytes,
            )

    def _enter(self, key: str | None, digest: str, vectors: AdapterVectors) -> _Content:
        """`digest`: the vectors'. A new one takes a while, and the model's thread would wait for it
        if it were made under the mutex."""
        content = self._contents.setdefault(digest, _Content(vectors))
        self._take_out(content)
        if key is not None:
            content.keys.add(key)
            self._by_key[key] = digest
        return content

    def _fill(self, content: _Content, evict_kept: bool) -> bool:
        """False: what is pinned or kept leaves no slot, or no room for whole modules."""
        if not self._make_room(content.vectors.saved_bytes, evict_kept):
            return False
        self._clear()
        slot = self._free.pop()
        try:
            # Most take a few hundred kilobytes of host memory, and only this thread uses slots.
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
        """Evict until there is a slot and room for so many bytes of whole modules.

        `evict_kept`: where nothing else makes enough room, kept modules give way to a row's, so
        that whatever was let in can run.
        """
        leaving: list[_Content] = []
        if not self._free:
            first = next((content for content in self._idle() if not content.kept), None)
            if first is None:
                return False
            leaving.append(first)
        excess = self._saved_bytes + saved_bytes - self._slots.saved_capacity
        excess -= sum(content.vectors.saved_bytes for content in leaving)
        if excess > 0:
            for content in sorted(self._idle(), key=lambda content: content.kept > 0):
                may_go = content.vectors.saved and (evict_kept or not content.kept)
                if excess > 0 and may_go and content not in leaving:
                    leaving.append(content)
                    excess -= content.vectors.saved_bytes
        if excess > 0:
            return False
        for content in leaving:
            self._evict(content)
            self._rest(content)
        return True

    def _idle(self) -> Iterator[_Content]:
        """What is resident and used by no row, least recently used first."""
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

    def _let_go(self, content: _Content) -> None:
        if content.retired and not content.leases and not content.kept:
            self._evict(content)
        self._rest(content)

    def _rest(self, content: _Content) -> None:
        """What nothing uses stays within the budget for host memory, but for what is retired."""
        if content.leases or content.kept or content.slot is not None:
            return
        if content.retired:
            self._forget(content)
            return
        self._take_out(content)
        self._unused[content.vectors.digest] = None
        self._unused_bytes += content.vectors.nbytes
        while self._unused_bytes > self._host_bytes:
            self._forget(self._contents[next(iter(self._unused))])

    def _take_out(self, content: _Content) -> None:
        """Something uses it again, or nothing ever will."""
        if content.vectors.digest in self._unused:
            del self._unused[content.vectors.digest]
            self._unused_bytes -= content.vectors.nbytes

    def _forget(self, content: _Content) -> None:
        self._take_out(content)
        del self._contents[content.vectors.digest]
        for key in content.keys:
            self._by_key.pop(key, None)
