"""Vectors that nothing uses stay in host memory, within a budget."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.layouts import Layouts
from tests.adapters.house import House
from tests.adapters.kinds import Known


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Records the folders from which adapters are read."""
    folders: list[Path] = []

    read = Layouts.read

    def noting(layouts: Layouts, folder: Path) -> AdapterVectors:
        folders.append(folder)
        return read(layouts, folder)

    monkeypatch.setattr(Layouts, "read", noting)
    return folders


@pytest.fixture
def house_with(tmp_path: Path, known: Known) -> Iterator[Callable[..., House]]:
    """A house with all kinds of adapters, and host memory for some of them."""
    houses: list[House] = []

    def make(*kinds: str) -> House:
        room = sum(known.vectors[kind].nbytes for kind in kinds)
        house = House(tmp_path, known, room)
        houses.append(house)
        for kind in known.folders:
            house.add(kind, kind)
        return house

    yield make
    for house in houses:
        house.store.close()


def use(house: House, kind: str) -> None:
    with house.registry.lease(kind) as lease:
        assert house.computes(house.pin(lease), kind)
        house.registry.residency.unpin(lease)


def test_an_evicted_adapter_comes_back_without_the_disk(
    house_with: Callable[..., House], reads: list[Path]
) -> None:
    house = house_with("default")
    reads.clear()
    for kind in ("default", "queries", "mlp_out"):
        use(house, kind)
    assert house.registry.stats().host_bytes == house.known.vectors["default"].nbytes
    use(house, "default")
    assert len(reads) == 3


def test_host_memory_keeps_what_was_used_last(
    house_with: Callable[..., House], reads: list[Path]
) -> None:
    house = house_with("queries")
    for kind in ("default", "queries", "mlp_out", "default"):
        use(house, kind)
    reads.clear()
    use(house, "queries")
    assert house.registry.stats().host_bytes <= house.known.vectors["queries"].nbytes
    assert not reads


def test_host_memory_forgets_what_is_deleted(house_with: Callable[..., House]) -> None:
    house = house_with("default")
    with house.registry.lease("default"):
        pass
    assert house.registry.stats().host_bytes > 0
    house.registry.delete("default")
    assert house.registry.stats().host_bytes == 0


def test_without_host_memory_what_nothing_uses_is_forgotten(
    house_with: Callable[..., House], reads: list[Path]
) -> None:
    house = house_with()
    reads.clear()
    for _ in range(2):
        with house.registry.lease("default"):
            pass
    assert len(reads) == 2
    assert house.registry.stats().host_bytes == 0
