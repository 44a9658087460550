"""The registry through any sequence of uploads, requests and steps: each row is PEFT's."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from infuse.adapters.errors import AdapterExists, UnknownAdapter
from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.residency import Lease
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.kinds import KINDS, Known, packed_logits
from tests.factories import tiny_llama

CAPACITY = 2
names = st.sampled_from("ab")
kinds = st.sampled_from(sorted(KINDS))


class RegistryMachine(RuleBasedStateMachine):
    """Requests lease, pin, unpin and end, while names change."""

    known: Known

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = AdapterStore(self.folder)
        self.model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
        self.model.bank.reserve_rows(16)
        self.host_bytes = self.known.vectors["default"].nbytes
        self.registry = AdapterRegistry(
            self.store, self.model.modules_of_base, self.model, host_bytes=self.host_bytes
        )
        self.alive: dict[str, dict[int, str]] = {}
        """Name -> revision number -> kind."""
        self.waiting: list[tuple[Lease, str]] = []
        self.running: list[tuple[Lease, str, int]] = []

    def teardown(self) -> None:
        for lease, _, _ in self.running:
            self.registry.residency.unpin(lease)
        for lease, *_ in [*self.running, *self.waiting]:
            lease.release()
        stats = self.registry.stats()
        assert (stats.leases, stats.pinned) == (0, 0)
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(name=names, kind=kinds)
    def add(self, name: str, kind: str) -> None:
        if name in self.alive:
            with pytest.raises(AdapterExists):
                self.registry.add(name, self.known.folders[kind])
            return
        with self.store.staging() as staged:
            shutil.copytree(self.known.folders[kind], staged, dirs_exist_ok=True)
            revision, _ = self.registry.add(name, staged)
        self.alive[name] = {revision.number: kind}

    @rule(name=names, kind=kinds)
    def replace(self, name: str, kind: str) -> None:
        if name not in self.alive:
            with pytest.raises(UnknownAdapter):
                self.registry.replace(name, self.known.folders[kind])
            return
        with self.store.staging() as staged:
            shutil.copytree(self.known.folders[kind], staged, dirs_exist_ok=True)
            revision, changed, _ = self.registry.replace(name, staged)
        assert changed == (self.alive[name].get(revision.number) is None)
        self.alive[name].setdefault(revision.number, kind)

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.alive:
            self.registry.delete(name)
            del self.alive[name]
        else:
            with pytest.raises(UnknownAdapter):
                self.registry.delete(name)

    @precondition(lambda self: self.alive and len(self.waiting) < 6)
    @rule(data=st.data(), by_number=st.booleans())
    def request(self, data: st.DataObject, by_number: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.alive)))
        revisions = self.alive[name]
        number = data.draw(st.sampled_from(sorted(revisions))) if by_number else max(revisions)
        lease = self.registry.lease(f"{name}@{number}" if by_number else name)
        assert lease.label.endswith(f"@{number}")
        self.waiting.append((lease, revisions[number]))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        lease, kind = data.draw(st.sampled_from(self.waiting))
        pinned = {kind for _, kind, _ in self.running}
        slot = self.registry.residency.pin(lease)
        if slot is None:
            assert len(pinned) == CAPACITY
            assert kind not in pinned
        else:
            self.waiting.remove((lease, kind))
            self.running.append((lease, kind, slot))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), ends=st.booleans())
    def preempt_or_end(self, data: st.DataObject, ends: bool) -> None:
        lease, kind, slot = data.draw(st.sampled_from(self.running))
        self.running.remove((lease, kind, slot))
        self.registry.residency.unpin(lease)
        if ends:
            lease.release()
        else:
            self.waiting.append((lease, kind))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        lease, kind = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove((lease, kind))
        lease.release()

    @precondition(lambda self: self.running)
    @rule(prefill=st.booleans())
    def step(self, prefill: bool) -> None:
        slots = [slot for _, _, slot in self.running][:16]
        held = {slot: kind for _, kind, slot in self.running}
        segments = [Segment(slot, 3) for slot in slots[:2]] if prefill else []
        got = packed_logits(self.model, slots, segments)
        assert torch.allclose(got, self.known.step(held, slots, segments), atol=1e-5)

    @invariant()
    def each_running_kind_has_one_slot_of_its_own(self) -> None:
        held = {(kind, slot) for _, kind, slot in self.running}
        assert len(held) == len({kind for kind, _ in held}) == len({slot for _, slot in held})

    @invariant()
    def the_numbers_are_what_is_held(self) -> None:
        stats = self.registry.stats()
        assert stats.registered == len(self.alive)
        assert stats.leases == len(self.waiting) + len(self.running)
        assert stats.pinned == len({kind for _, kind, _ in self.running})
        assert stats.pinned <= stats.resident <= CAPACITY
        assert 0 <= stats.host_bytes <= self.host_bytes


def test_any_sequence_of_uploads_requests_and_steps(known: Known) -> None:
    RegistryMachine.known = known
    machine = RegistryMachine.TestCase
    machine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    machine().runTest()
