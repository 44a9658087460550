"""What adapters may rescale is planned at the start; an adapter that needs more is refused."""

import shutil
from pathlib import Path

import pytest

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target
from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.registry import AdapterRegistry, Part
from infuse.adapters.storage.revision import DetailsChange
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine import UnsupportedModel
from infuse.server.engine.vllm.llm import Slots
from infuse.server.engine.vllm.targets import check_targets, planned_targets
from tests.adapters.oracle import vectors_of
from tests.factories import save_adapter, tiny_llama, tiny_model

BASE = tiny_llama()
MODULES = BaseModules.of(BASE)
HERE = "model.layers.{}."
WIDER = {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def planned(names: str) -> set[Target]:
    targets = planned_targets(MODULES, names)
    assert len(set(targets)) == len(targets)
    return set(targets)


def in_every_layer(*modules: str, side: Side = Side.OUTPUT) -> set[Target]:
    return {Target(f"model.layers.{layer}.{name}", side) for layer in (0, 1) for name in modules}


def vectors(folder: Path, **config: object) -> AdapterVectors:
    return vectors_of(save_adapter(BASE, folder, **config), BASE)


def refusal(of: AdapterVectors, names: str = "") -> str:
    with pytest.raises(InvalidAdapter) as refused:
        check_targets(of, planned(names))
    return str(refused.value)


def test_without_names_adapters_may_have_pefts_default_targets() -> None:
    attention = in_every_layer("self_attn.k_proj", "self_attn.v_proj")
    assert planned("") == attention | in_every_layer("mlp.down_proj", side=Side.INPUT)


def test_names_are_those_of_modules_with_their_side() -> None:
    wanted = in_every_layer("self_attn.o_proj") | in_every_layer("mlp.up_proj", side=Side.INPUT)
    assert planned("o_proj, up_proj:input") == wanted


def test_a_module_can_be_named_on_both_sides() -> None:
    both = in_every_layer("mlp.up_proj") | in_every_layer("mlp.up_proj", side=Side.INPUT)
    assert planned("up_proj,up_proj:input,up_proj") == both


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    modules = MODULES.sizes.keys() - {"lm_head"}
    assert planned("all-linear") == {Target(module, Side.OUTPUT) for module in modules}
    assert planned("all-linear:input") == {Target(module, Side.INPUT) for module in modules}


def test_a_name_that_no_module_has_is_refused_and_the_names_are_told() -> None:
    with pytest.raises(UnsupportedModel, match=r"--ia3-targets w_proj: .*down_proj, gate_proj"):
        planned("k_proj,w_proj")


def test_a_name_of_something_else_than_a_linear_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"--ia3-targets embed_tokens: .*no linear layer"):
        planned("embed_tokens")


def test_a_family_without_defaults_needs_names() -> None:
    modules = BaseModules.of(tiny_model("qwen3"))
    assert modules.model_type == "qwen3"
    olmo = BaseModules.of(tiny_model("olmo"))
    with pytest.raises(UnsupportedModel, match=r"olmo .*--ia3-targets, for example k_proj"):
        planned_targets(olmo, "")


def test_an_adapter_with_planned_targets_is_accepted(tmp_path: Path) -> None:
    check_targets(vectors(tmp_path), planned(""))


def test_an_adapter_that_needs_more_is_refused_with_the_setting_that_allows_it(
    tmp_path: Path,
) -> None:
    told = refusal(vectors(tmp_path, **WIDER))

    assert "model.layers.0.self_attn.q_proj (output)" in told
    assert "start it with --ia3-targets that also name q_proj" in told


def test_a_planned_module_on_the_other_side_is_refused(tmp_path: Path) -> None:
    outward = vectors(tmp_path, target_modules=["down_proj"], feedforward_modules=[])

    assert "--ia3-targets that also name down_proj" in refusal(outward)
    assert "also name down_proj:input" in refusal(vectors(tmp_path / "in"), "k_proj,v_proj")


def test_a_refusal_names_a_few_modules_and_counts_the_others(tmp_path: Path) -> None:
    every = vectors(tmp_path, target_modules="all-linear", feedforward_modules=[])

    assert "and 5 more" in refusal(every)


def test_an_adapter_with_whole_modules_is_refused_with_the_reason(tmp_path: Path) -> None:
    told = refusal(vectors(tmp_path, modules_to_save=["lm_head"]))

    assert "brings whole modules (lm_head), which the vLLM engine cannot exchange" in told
    assert "serve with --engine native" in told


class House:
    """A store that another server filled, which allowed more targets."""

    def __init__(self, folder: Path) -> None:
        self.store = AdapterStore(folder / "store")
        self.put("stored", save_adapter(BASE, folder / "wide", **WIDER))
        self.put("fits", save_adapter(BASE, folder / "fits"))
        self.registry = self.opened()

    def put(self, name: str, source: Path) -> None:
        with self.store.staging() as staged:
            shutil.copytree(source, staged, dirs_exist_ok=True)
            self.store.create(name, staged)

    def opened(self) -> AdapterRegistry:
        return AdapterRegistry(self.store, MODULES, Slots(planned_targets(MODULES, ""), 2))


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def test_a_stored_adapter_that_needs_more_is_refused_when_it_is_asked_for(house: House) -> None:
    with pytest.raises(InvalidAdapter, match="--ia3-targets that also name q_proj"):
        house.registry.lease("stored")


def test_a_mixture_that_needs_more_is_refused_when_it_is_asked_for(house: House) -> None:
    with pytest.raises(InvalidAdapter, match="--ia3-targets that also name q_proj"):
        house.registry.lease_mixture([Part("fits"), Part("stored")], "product")
    with pytest.raises(InvalidAdapter, match="--ia3-targets that also name q_proj"):
        house.registry.lease_mixture([Part("stored", 0.5)], "product")
    assert house.registry.stats().leases == 0


def test_an_adapter_that_needs_more_cannot_be_pinned(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InvalidAdapter, match="--ia3-targets that also name q_proj"):
        house.registry.describe("stored", DetailsChange(pinned=True))
    assert not house.store.details("stored").pinned
    house.store.describe("stored", DetailsChange(pinned=True))

    registry = house.opened()
    assert "pinned adapter stored@1 is not on the device" in caplog.text
    registry.residency.settle()
    assert registry.stats().resident == 0
