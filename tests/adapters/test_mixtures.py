"""Mixtures leased for one request, new adapters combined, adapters kept on the device."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
import pytest
import torch

from infuse.adapters.checkpoint.checkpoint import product
from infuse.adapters.errors import (
    AdapterDisabled,
    AdapterExists,
    CombinedNotFinite,
    TooManyPinned,
    UnknownAdapter,
)
from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry, Part
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from tests.adapters.kinds import Known
from tests.adapters.oracle import vectors_of
from tests.factories import tiny_llama

CAPACITY = 3
IDS = torch.tensor([[5, 6, 7, 8]])


class House:
    def __init__(self, folder: Path, known: Known) -> None:
        self.folders = known.folders
        self.store = AdapterStore(folder)
        self.model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
        self.registry = AdapterRegistry(
            self.store, self.model.modules_of_base, self.model, reserved=("tiny",)
        )

    def add(self, *kinds: str) -> None:
        for kind in kinds:
            with self.store.staging() as staged:
                shutil.copytree(self.folders[kind], staged, dirs_exist_ok=True)
                self.registry.add(kind, staged)

    def mixed(self, parts: Sequence[Part], composition: str) -> torch.Tensor:
        """Return the logits of a row that uses the mixture."""
        with self.registry.lease_mixture(parts, composition) as lease:  # type: ignore[arg-type]
            slot = self.registry.residency.pin(lease)
            assert slot is not None
            self.model.set_packed([], [Segment(slot, IDS.shape[1])])
            with torch.inference_mode():
                logits = self.model.base(IDS).logits
            self.registry.residency.unpin(lease)
        return logits


@pytest.fixture
def house(tmp_path: Path, known: Known) -> Iterator[House]:
    house = House(tmp_path / "store", known)
    house.add("default", "queries", "mlp_out")
    yield house
    house.store.close()


def by_peft(known: Known, *kinds: str) -> torch.Tensor:
    """PEFT computes the same with several active adapters, whose sides agree."""
    model = peft.PeftModel.from_pretrained(tiny_llama(), known.folders[kinds[0]], kinds[0])
    for kind in kinds[1:]:
        model.load_adapter(known.folders[kind], kind)
    model.base_model.set_adapter(list(kinds))
    with torch.inference_mode():
        return model.eval()(IDS).logits


def test_a_product_is_pefts_of_several_active_adapters(house: House, known: Known) -> None:
    found = house.mixed([Part("default"), Part("queries")], "product")

    torch.testing.assert_close(found, by_peft(known, "default", "queries"))


def test_a_linear_mixture_of_one_is_the_adapter(house: House, known: Known) -> None:
    torch.testing.assert_close(house.mixed([Part("queries")], "linear"), by_peft(known, "queries"))


def test_equal_mixtures_share_a_slot_and_none_is_left_leased(house: House) -> None:
    parts = [Part("default", 0.5), Part("queries@1", 2)]
    house.mixed(parts, "product")
    house.mixed(parts, "product")
    stats = house.registry.stats()

    assert (stats.swaps, stats.leases, stats.pinned) == (1, 0, 0)


def test_a_mixture_says_what_it_is_made_of(house: House) -> None:
    with house.registry.lease_mixture([Part("default", 0.5), Part("queries")], "linear") as lease:
        assert lease.label == "linear(default@1*0.5,queries@1*1)"


def test_a_mixture_outlives_its_adapters(house: House) -> None:
    lease = house.registry.lease_mixture([Part("default"), Part("queries")], "product")
    house.registry.delete("default")
    with pytest.raises(UnknownAdapter):
        house.registry.lease_mixture([Part("default")], "product")

    assert house.registry.residency.pin(lease) is not None
    house.registry.residency.unpin(lease)
    lease.release()


def test_weights_that_overflow_are_refused(house: House) -> None:
    with pytest.raises(CombinedNotFinite):
        house.registry.lease_mixture([Part("default", 1e38)] * 9, "product")


def test_a_disabled_adapter_is_not_leased_but_finishes(house: House) -> None:
    running = house.registry.lease("default")
    house.registry.describe("default", DetailsChange(enabled=False))
    with pytest.raises(AdapterDisabled):
        house.registry.lease("default")
    with pytest.raises(AdapterDisabled):
        house.registry.lease_mixture([Part("default")], "product")

    assert house.registry.residency.pin(running) is not None
    house.registry.residency.unpin(running)
    running.release()
    house.registry.describe("default", DetailsChange(enabled=True))
    house.registry.lease("default").release()


# Combining


def test_a_combined_adapter_is_stored_with_its_recipe_and_peft_loads_it(
    house: House, known: Known
) -> None:
    revision, warnings = house.registry.combine(
        "both", [Part("default"), Part("queries")], "product", by="ops"
    )
    model = peft.PeftModel.from_pretrained(tiny_llama(), house.store.files(revision))
    with torch.inference_mode():
        found = model.eval()(IDS).logits

    assert warnings == []
    assert (revision.origin.source, revision.origin.by) == ("combine", "ops")
    assert revision.origin.recipe is not None
    assert [a["name"] for a in revision.origin.recipe["adapters"]] == ["default@1", "queries@1"]
    torch.testing.assert_close(found, by_peft(known, "default", "queries"))


def test_different_sides_of_one_module_combine_and_say_that_peft_cannot_read_them(
    house: House, known: Known
) -> None:
    """`default` rescales what goes into down_proj, `mlp_out` what comes out of it."""
    parts = [Part("default"), Part("mlp_out")]
    revision, warnings = house.registry.combine("sides", parts, "product")
    stored = vectors_of(house.store.files(revision), tiny_llama())
    wanted = product([known.vectors["default"], known.vectors["mlp_out"]]).vectors

    assert any("both sides" in warning for warning in warnings)
    assert stored.vectors.keys() == wanted.keys()
    for target, vector in stored.vectors.items():
        torch.testing.assert_close(vector, wanted[target])


def test_a_name_that_is_taken_is_never_silently_kept(house: House) -> None:
    for name in ("queries", "tiny"):
        with pytest.raises(AdapterExists):
            house.registry.combine(name, [Part("default")], "linear")


def test_linear_weights_far_from_one_in_sum_are_a_warning(house: House) -> None:
    _, warnings = house.registry.combine("loud", [Part("default", 2.0)], "linear")

    assert any("sum to 2" in warning for warning in warnings)


# Kept on the device


def test_a_pinned_adapter_takes_a_slot_before_anyone_asks_and_is_never_evicted(
    house: House,
) -> None:
    house.registry.describe("default", DetailsChange(pinned=True))
    house.registry.residency.settle()
    assert house.registry.stats().resident == 1
    for weight in range(2, 8):
        house.mixed([Part("queries", weight)], "product")
    swaps = house.registry.stats().swaps
    with house.registry.lease("default") as lease:
        house.registry.residency.pin(lease)
        house.registry.residency.unpin(lease)

    assert house.registry.stats().swaps == swaps
    assert house.registry.stats().leases == 0


def test_a_pinned_adapter_that_finds_every_slot_in_use_takes_the_next_one(house: House) -> None:
    parts = [Part("queries"), Part("queries", 2), Part("queries", 3)]
    leases = [house.registry.lease_mixture([part], "product") for part in parts]
    for lease in leases:
        house.registry.residency.pin(lease)
    house.registry.describe("default", DetailsChange(pinned=True))
    house.registry.residency.settle()
    for lease in leases:
        house.registry.residency.unpin(lease)
        lease.release()
    house.registry.residency.settle()
    swaps = house.registry.stats().swaps
    with house.registry.lease("default") as lease:
        house.registry.residency.pin(lease)
        house.registry.residency.unpin(lease)

    assert house.registry.stats().swaps == swaps


def test_a_pin_follows_its_name_and_goes_with_it(house: House, known: Known) -> None:
    house.registry.describe("default", DetailsChange(pinned=True))
    with house.store.staging() as staged:
        shutil.copytree(known.folders["mlp_out"], staged, dirs_exist_ok=True)
        house.registry.replace("default", staged)
    house.registry.residency.settle()
    assert house.registry.stats().resident == 1
    with house.registry.lease("mlp_out") as lease:
        house.registry.residency.pin(lease)
        house.registry.residency.unpin(lease)
    assert house.registry.stats().swaps == 1
    house.registry.delete("mlp_out")
    house.registry.delete("default")

    assert house.registry.stats().resident == 0


def test_one_slot_stays_for_the_others(house: House) -> None:
    for kind in ("default", "queries"):
        house.registry.describe(kind, DetailsChange(pinned=True))
    with pytest.raises(TooManyPinned, match="2 adapters are pinned already"):
        house.registry.describe("mlp_out", DetailsChange(pinned=True))

    assert not house.store.details("mlp_out").pinned
    house.registry.describe("default", DetailsChange(pinned=False))
    house.registry.describe("mlp_out", DetailsChange(pinned=True))


def test_pins_hold_over_a_restart(house: House) -> None:
    house.registry.describe("default", DetailsChange(pinned=True))
    model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
    again = AdapterRegistry(house.store, model.modules_of_base, model)
    again.residency.settle()

    assert again.stats().resident == 1
