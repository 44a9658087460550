"""Leases, pins and slots."""

import json
import shutil
import threading
from pathlib import Path

import pytest

from infuse.adapters.checkpoint.checkpoint import WEIGHTS_FILE, AdapterVectors
from infuse.adapters.checkpoint.config import CONFIG_FILE
from infuse.adapters.errors import (
    AdapterExists,
    InvalidAdapter,
    RevisionConflict,
    RevisionDamaged,
    UnknownAdapter,
    UnknownRevision,
)
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry, Part
from infuse.adapters.storage.revision import Revision
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.house import CAPACITY, House
from tests.adapters.oracle import vectors_of
from tests.factories import save_adapter, tiny_llama

# Uploads


def test_an_upload_is_checked_and_registered_but_not_resident(house: House) -> None:
    house.add("support", "default")
    stats = house.registry.stats()
    assert (stats.registered, stats.resident, stats.swaps) == (1, 0, 0)


def test_a_faulty_upload_is_refused_and_the_name_stays_as_it_is(house: House) -> None:
    house.add("support", "default")

    def spoiled(staged: Path) -> None:
        (staged / WEIGHTS_FILE).write_bytes(b"nonsense")
        with pytest.raises(InvalidAdapter, match="damaged"):
            house.registry.add("new", staged)
        with pytest.raises(InvalidAdapter, match="damaged"):
            house.registry.replace("support", staged)

    house.upload(spoiled, "queries")
    assert house.store.names() == ["support"]
    assert house.store.current("support").number == 1


@pytest.mark.parametrize("name", ["tiny", "tiny-alias"])
def test_the_base_s_names_are_reserved(house: House, name: str) -> None:
    with pytest.raises(AdapterExists, match=name):
        house.add(name, "default")
    house.registry.check_name("tiny-2")
    with pytest.raises(InvalidAdapter):
        house.registry.check_name("../tiny")


def test_another_base_is_a_warning_of_the_check_and_of_the_upload(house: House) -> None:
    def renamed(staged: Path) -> None:
        config = json.loads((staged / CONFIG_FILE).read_text())
        config["base_model_name_or_path"] = "someone/large"
        (staged / CONFIG_FILE).write_text(json.dumps(config))
        vectors, warnings = house.registry.check(staged)
        assert vectors.digest == house.known.vectors["default"].digest
        assert "'someone/large'" in warnings[0]
        assert "'tiny'" in warnings[0]
        revision, from_add = house.registry.add("support", staged)
        assert from_add == warnings
        assert revision.number == 1

    house.upload(renamed, "default")


def test_without_a_base_s_name_there_is_nothing_to_compare(house: House) -> None:
    registry = AdapterRegistry(house.store, house.model.modules_of_base, house.model)
    assert registry.check(house.known.folders["default"])[1] == []


def test_whoever_has_a_registry_uploads_lists_and_closes(house: House) -> None:
    registry, stored = house.registry, house.registry.stored
    with registry.staging() as staged:
        shutil.copytree(house.known.folders["default"], staged, dirs_exist_ok=True)
        revision, _ = registry.add("support", staged)
    assert (len(stored), stored.names(), "support" in stored) == (1, ["support"], True)
    assert stored.current("support") == stored.revision("support", 1) == revision
    assert stored.revisions("support") == [revision]
    assert (stored.verified(revision) / CONFIG_FILE).is_file()
    assert not stored.is_damaged(revision)
    assert stored.details("support").enabled
    registry.delete("support")
    assert stored.was_deleted("support")
    registry.close()
    AdapterStore(house.folder).close()


def test_an_unknown_name_or_an_old_etag_changes_nothing(house: House) -> None:
    house.add("support", "default")
    with pytest.raises(UnknownAdapter):
        house.replace("nobody", "queries")
    with pytest.raises(UnknownAdapter):
        house.registry.delete("nobody")
    with pytest.raises(RevisionConflict):
        house.registry.delete("support", if_match='"old"')
    assert house.store.current("support").number == 1


# Leases


def test_a_lease_is_on_the_current_revision_or_on_the_one_named(house: House) -> None:
    house.add("support", "default")
    house.replace("support", "queries")
    for model, number, kind in (("support", 2, "queries"), ("support@1", 1, "default")):
        with house.registry.lease(model) as lease:
            assert lease.label == f"support@{number}"
            assert lease.vectors.digest == house.known.vectors[kind].digest


@pytest.mark.parametrize(
    "model", ["nobody", "nobody@1", "", "@1", "support@", "support@x", "support@-1", "support@٣"]
)
def test_what_names_no_adapter_is_unknown(house: House, model: str) -> None:
    house.add("support", "default")
    with pytest.raises(UnknownAdapter):
        house.registry.lease(model)
    assert house.registry.stats().leases == 0


@pytest.mark.parametrize("number", ["0", "2", "999999999"])
def test_an_unknown_revision_is_told_from_an_unknown_name(house: House, number: str) -> None:
    house.add("support", "default")
    with pytest.raises(UnknownRevision):
        house.registry.lease(f"support@{number}")


@pytest.mark.parametrize("delete", [True, False], ids=["deleted", "replaced"])
def test_a_leased_revision_survives_its_name(house: House, delete: bool) -> None:
    house.add("support", "default")
    lease = house.registry.lease("support")
    slot = house.pin(lease)
    if delete:
        house.registry.delete("support")
    else:
        house.replace("support", "queries")
    assert house.computes(slot, "default")
    house.registry.residency.unpin(lease)
    assert house.computes(house.pin(lease), "default")


def test_a_leased_revision_that_was_never_pinned_survives_too(house: House) -> None:
    house.add("support", "default")
    lease = house.registry.lease("support")
    house.registry.delete("support")
    with pytest.raises(UnknownAdapter):
        house.registry.lease("support")
    assert house.computes(house.pin(lease), "default")


def test_a_slot_of_a_deleted_adapter_is_freed_with_the_last_lease(house: House) -> None:
    house.add("support", "default")
    first, second = house.registry.lease("support"), house.registry.lease("support")
    house.pin(first)
    house.registry.delete("support")
    house.registry.residency.unpin(first)
    first.release()
    assert house.registry.stats().resident == 1
    second.release()
    assert house.registry.stats().resident == 0


def test_the_slot_of_a_replaced_adapter_is_freed_at_once_without_leases(house: House) -> None:
    house.add("support", "default")
    with house.registry.lease("support") as lease:
        house.pin(lease)
        house.registry.residency.unpin(lease)
    assert house.registry.stats().resident == 1
    house.replace("support", "default")
    assert house.registry.stats().resident == 1, "the same content"
    house.replace("support", "queries")
    assert house.registry.stats().resident == 0


def test_an_adapter_that_is_uploaded_again_while_it_is_leased_stays_resident(house: House) -> None:
    house.add("support", "default")
    old = house.registry.lease("support")
    house.pin(old)
    house.registry.delete("support")
    house.add("support", "default")
    with house.registry.lease("support"):
        house.registry.residency.unpin(old)
        old.release()
    assert house.registry.stats().resident == 1


def test_releasing_a_lease_twice_does_nothing(house: House) -> None:
    house.add("support", "default")
    kept, twice = house.registry.lease("support"), house.registry.lease("support")
    twice.release()
    twice.release()
    assert house.registry.stats().leases == 1
    kept.release()


def test_a_lease_is_released_when_its_request_fails(house: House) -> None:
    house.add("support", "default")
    with pytest.raises(RuntimeError, match="broken"), house.registry.lease("support"):
        raise RuntimeError("broken")
    assert house.registry.stats().leases == 0


def test_an_adapter_deleted_while_it_is_looked_up_is_unknown(house: House) -> None:
    class Racing(AdapterStore):
        """Deletes the name right after a request has found it."""

        def current(self, name: str) -> Revision:
            found = super().current(name)
            if threading.current_thread() is threading.main_thread():
                other = threading.Thread(target=self.delete, args=(name,))
                other.start()
                other.join()
            return found

    house.add("support", "default")
    house.store.close()
    house.store = Racing(house.store.files(house.store.current("support")).parents[1])
    registry = AdapterRegistry(house.store, house.model.modules_of_base, house.model)
    with pytest.raises(UnknownAdapter):
        registry.lease("support")


@pytest.mark.parametrize("method", ["lease", "lease_mixture", "mixture", "combine"])
def test_an_adapter_replaced_while_it_is_looked_up_is_used_as_it_is_then(
    house: House, method: str
) -> None:
    class Racing(AdapterStore):
        """Another server replaces the revision right after a request has found it, once; its files
        go."""

        def current(self, name: str) -> Revision:
            found = super().current(name)
            if found.number == 1:
                with self.staging() as staged:
                    shutil.copytree(house.known.folders["queries"], staged, dirs_exist_ok=True)
                    thread = threading.Thread(target=self.replace, args=(name, staged))
                    thread.start()
                    thread.join()
            return found

    house.add("support", "default")
    house.store.close()
    house.store = Racing(house.folder, keep_revisions=1)
    registry = AdapterRegistry(house.store, house.model.modules_of_base, house.model)
    match method:
        case "lease":
            used = registry.lease("support").label
        case "lease_mixture":
            used = registry.lease_mixture([Part("support", 0.5)], "product").label
        case "mixture":
            used = str(registry.mixture([Part("support")], "product")[1])
        case _:
            revision, _ = registry.combine("both", [Part("support")], "product")
            used = str(revision.origin.recipe)
    assert "support@2" in used


def test_files_that_were_damaged_later_are_no_fault_of_the_request(house: House) -> None:
    house.add("support", "default")
    (house.store.files(house.store.current("support")) / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(RevisionDamaged, match="'support@1' are damaged"):
        house.registry.lease("support")
    assert house.registry.stats().leases == 0


# Slots


def test_a_slot_is_filled_on_first_use_and_kept_for_the_next(house: House) -> None:
    house.add("support", "default")
    for _ in range(3):
        with house.registry.lease("support") as lease:
            assert house.computes(house.pin(lease), "default")
            house.registry.residency.unpin(lease)
    assert house.registry.stats().swaps == 1


def test_adapters_that_do_the_same_share_a_slot(house: House, tmp_path: Path) -> None:
    twin = save_adapter(
        tiny_llama(), tmp_path / "twin", seed=0, target_modules=".*(k_proj|v_proj|down_proj)"
    )
    assert vectors_of(twin, tiny_llama()).digest == house.known.vectors["default"].digest
    house.add("one", "default")
    house.add("two", "default")
    house.registry.add("three", twin)
    leases = [house.registry.lease(name) for name in ("one", "two", "three")]
    assert len({house.pin(lease) for lease in leases}) == 1
    assert len({house.store.current(name).digest for name in ("one", "three")}) == 2
    assert house.registry.stats().pinned == 1


def test_a_name_that_is_deleted_leaves_its_twin_leased(house: House) -> None:
    house.add("one", "default")
    house.add("two", "default")
    lease = house.registry.lease("two")
    slot = house.pin(lease)
    house.registry.delete("one")
    assert house.computes(slot, "default")
    house.registry.residency.unpin(lease)
    lease.release()
    with house.registry.lease("two") as again:
        assert house.computes(house.pin(again), "default")
        house.registry.residency.unpin(again)


def test_the_least_recently_used_adapter_is_evicted(house: House) -> None:
    for kind in house.known.folders:
        house.add(kind, kind)
    use = ["default", "queries", "default", "mlp_out"]
    slots = {}
    for kind in use:
        with house.registry.lease(kind) as lease:
            slots[kind] = house.pin(lease)
            house.registry.residency.unpin(lease)
    assert slots["mlp_out"] == slots["queries"] != slots["default"]
    assert house.computes(slots["default"], "default")
    assert house.computes(slots["mlp_out"], "mlp_out")


def test_a_pinned_adapter_is_never_evicted_and_without_a_slot_one_waits(house: House) -> None:
    for kind in house.known.folders:
        house.add(kind, kind)
    leases = {kind: house.registry.lease(kind) for kind in house.known.folders}
    first, second = house.pin(leases["default"]), house.pin(leases["queries"])
    assert house.registry.residency.pin(leases["mlp_out"]) is None
    assert house.registry.stats().pinned == CAPACITY
    house.registry.residency.unpin(leases["queries"])
    assert house.pin(leases["mlp_out"]) == second
    assert house.computes(first, "default")


def test_an_evicted_adapter_comes_back_with_its_lease(house: House) -> None:
    house.add("default", "default")
    lease = house.registry.lease("default")
    house.pin(lease)
    house.registry.residency.unpin(lease)
    for kind in ("queries", "mlp_out"):
        house.add(kind, kind)
        house.pin(house.registry.lease(kind))
    assert house.registry.residency.pin(lease) is None
    house.registry.residency.unpin(house.registry.lease("mlp_out"))
    assert house.computes(house.pin(lease), "default")


def test_an_adapter_pinned_twice_stays_until_it_is_unpinned_twice(house: House) -> None:
    for kind in house.known.folders:
        house.add(kind, kind)
    twice, once, third = (house.registry.lease(kind) for kind in house.known.folders)
    for lease in (twice, twice, once):
        house.pin(lease)
    house.registry.residency.unpin(twice)
    assert house.registry.residency.pin(third) is None
    house.registry.residency.unpin(twice)
    assert house.registry.residency.pin(third) is not None


def test_an_adapter_that_does_nothing_needs_no_slot(house: House) -> None:
    house.add("support", "default")
    nothing = house.registry.residency.lease("nothing", "nothing", AdapterVectors({}))
    assert house.registry.residency.pin(nothing) == 0
    house.registry.residency.unpin(nothing)
    assert house.registry.stats().pinned == 0


def test_a_slot_that_could_not_be_filled_is_not_lost(house: House) -> None:
    class Unlucky(IA3Slots):
        """The device is out of memory at first."""

        failures = CAPACITY + 1

        def fill_slot(self, slot: int, vectors: AdapterVectors) -> None:
            if self.failures:
                self.failures -= 1
                raise MemoryError
            super().fill_slot(slot, vectors)

    house.model = Unlucky(tiny_llama(), max_adapters=CAPACITY)
    house.registry = AdapterRegistry(house.store, house.model.modules_of_base, house.model)
    house.add("support", "default")
    lease = house.registry.lease("support")
    for _ in range(CAPACITY + 1):
        with pytest.raises(MemoryError):
            house.registry.residency.pin(lease)
    assert house.computes(house.pin(lease), "default")


def test_everything_is_zero_when_nothing_runs(house: House) -> None:
    for kind in house.known.folders:
        house.add(kind, kind)
    for kind in house.known.folders:
        with house.registry.lease(kind) as lease:
            house.pin(lease)
            house.registry.residency.unpin(lease)
    stats = house.registry.stats()
    assert (stats.registered, stats.leases, stats.pinned) == (3, 0, 0)
    assert (stats.resident, stats.swaps) == (CAPACITY, 3)
