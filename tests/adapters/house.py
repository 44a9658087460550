"""A registry over a real store and a real model with two slots."""

import shutil
from collections.abc import Callable
from pathlib import Path

from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.residency import Lease
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.kinds import Known, packed_logits
from tests.factories import tiny_llama

CAPACITY = 2


class House:
    def __init__(self, folder: Path, known: Known, host_bytes: int = 0) -> None:
        self.folder = folder
        self.known = known
        self.store = AdapterStore(folder)
        self.model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
        self.registry = AdapterRegistry(
            self.store,
            self.model.modules_of_base,
            self.model,
            reserved=("tiny", "tiny-alias"),
            host_bytes=host_bytes,
        )

    def upload(self, use: Callable[[Path], object], kind: str) -> None:
        with self.store.staging() as staged:
            shutil.copytree(self.known.folders[kind], staged, dirs_exist_ok=True)
            use(staged)

    def add(self, name: str, kind: str) -> None:
        self.upload(lambda staged: self.registry.add(name, staged), kind)

    def replace(self, name: str, kind: str) -> None:
        self.upload(lambda staged: self.registry.replace(name, staged), kind)

    def pin(self, lease: Lease) -> int:
        slot = self.registry.residency.pin(lease)
        assert slot is not None
        return slot

    def computes(self, slot: int, kind: str) -> bool:
        """Whether the slot computes what PEFT does with an adapter of that kind."""
        step = packed_logits(self.model, [], [Segment(slot, 6)])
        return bool(step.allclose(self.known.by_peft[kind], atol=1e-5))
