"""IA3Model by names: PEFT's calls, PEFT's results."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from infuse.adapters.errors import AdapterExists, InvalidAdapter, UnknownAdapter
from infuse.adapters.model.model import IA3Model
from infuse.adapters.model.tuned_layer import BASE_NAME, TunedLayer
from tests.adapters.oracle import logits, peft_logits, with_peft
from tests.adapters.tiny_t5 import tiny_t5
from tests.factories import save_adapter, tiny_llama, tiny_model

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "keys": {"target_modules": ["k_proj"], "feedforward_modules": []},
    "queries": {"target_modules": ["q_proj"], "feedforward_modules": []},
    "mlp": {"target_modules": ["up_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "mlp_in": {"target_modules": ["up_proj"], "feedforward_modules": ["up_proj"]},
    "mlp_out": {"target_modules": ["down_proj"], "feedforward_modules": []},
    "everything": {"target_modules": "all-linear", "feedforward_modules": r".*(o|gate)_proj"},
    "one_layer": {"target_modules": r".*\.1\..*_proj", "feedforward_modules": []},
}
IDS = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(3))

Saved = Callable[[str], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Return the folder of an adapter of that kind, saved by PEFT."""
    root = tmp_path_factory.mktemp("kinds")
    for seed, (kind, config) in enumerate(KINDS.items()):
        save_adapter(tiny_llama(), root / kind, seed=seed, **config)
    return lambda kind: root / kind


@pytest.fixture
def model(saved: Saved) -> IA3Model:
    """A model with an adapter of every kind attached and none active."""
    model = IA3Model(tiny_llama())
    for kind in KINDS:
        model.load_adapter(saved(kind), kind)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_an_active_adapter_gives_peft_s_logits(model: IA3Model, saved: Saved, kind: str) -> None:
    model.set_adapter(kind)
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved(kind)))


def test_an_adapter_changes_the_logits(model: IA3Model) -> None:
    plain = logits(tiny_llama(), IDS)
    for kind in KINDS:
        model.set_adapter(kind)
        assert not torch.allclose(logits(model, IDS), plain, atol=1e-2), kind


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gpt2", {"target_modules": ["c_fc", "mlp.c_proj"], "feedforward_modules": ["c_fc"]}),
        ("opt", {}),
        ("opt", {"target_modules": "all-linear", "feedforward_modules": ".*fc1"}),
        ("qwen2", {}),
        ("gpt_neox", {}),
    ],
    ids=str,
)
def test_every_family_gives_peft_s_logits_bit_for_bit(
    tmp_path: Path, family: str, config: dict[str, Any], dtype: torch.dtype
) -> None:
    """Vectors are float32 whatever the model's dtype, as PEFT keeps them."""
    base = tiny_model(family).to(dtype)
    folder = save_adapter(base, tmp_path, **config)
    expected = peft_logits(base, IDS, folder)

    model = IA3Model(base)
    model.load_adapter(folder, "a")
    model.set_adapter("a")
    assert torch.equal(logits(model, IDS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_decoder_reads_its_wrapped_layers_attributes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tiny_t5().to(dtype)
    folder = save_adapter(base, tmp_path)
    ids = IDS % 64
    expected = logits(with_peft(base, folder), ids, decoder_input_ids=ids)

    model = IA3Model(base)
    model.load_adapter(folder, "a")
    model.set_adapter("a")
    assert base.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == dtype
    assert torch.equal(logits(model, ids, decoder_input_ids=ids), expected)


def test_a_wrapper_has_the_attributes_of_its_base_layer_and_no_others(model: IA3Model) -> None:
    layer = model.model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer, TunedLayer)
    assert layer.weight is layer.base_layer.weight
    assert (layer.in_features, layer.out_features) == (64, 32)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


# Several at once


@pytest.mark.parametrize(
    "kinds",
    [
        ["default", "queries"],
        ["queries", "default"],
        ["default", "keys"],
        ["default", "mlp", "keys"],
        ["one_layer", "queries"],
    ],
    ids=" ".join,
)
def test_several_active_adapters_are_peft_s_product(
    model: IA3Model, saved: Saved, kinds: list[str]
) -> None:
    model.set_adapter(kinds)
    assert model.active_adapters == kinds
    expected = peft_logits(tiny_llama(), IDS, *(saved(kind) for kind in kinds))
    assert torch.equal(logits(model, IDS), expected)


def test_the_base_in_a_list_of_adapters_changes_nothing(model: IA3Model) -> None:
    model.set_adapter("keys")
    expected = logits(model, IDS)
    model.set_adapter([BASE_NAME, "keys"])
    assert torch.equal(logits(model, IDS), expected)


def test_products_one_after_the_other_are_the_last_one(model: IA3Model, saved: Saved) -> None:
    for kinds in (["default", "keys"], ["queries", "mlp"], ["default", "mlp"]):
        model.set_adapter(kinds)
    expected = peft_logits(tiny_llama(), IDS, saved("default"), saved("mlp"))
    assert torch.equal(logits(model, IDS), expected)


# Each row its own


def test_each_row_is_peft_s_with_its_adapter_alone(model: IA3Model, saved: Saved) -> None:
    """`mlp_out` and `default` disagree about the side of `down_proj`."""
    kinds = ["default", "mlp_out", "mlp_in"]
    with torch.no_grad():
        rows = model(IDS, adapter_names=kinds).logits
    for index, kind in enumerate(kinds):
        assert torch.equal(rows[index], peft_logits(tiny_llama(), IDS, saved(kind))[index])


def test_a_row_of_the_base_in_a_mixed_batch_is_the_plain_model_s(model: IA3Model) -> None:
    with torch.no_grad():
        rows = model(IDS, adapter_names=["everything", BASE_NAME, "default"]).logits
    assert torch.equal(rows[1], logits(tiny_llama(), IDS)[1])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_rows_of_other_families_are_peft_s_too(tmp_path: Path, family: str) -> None:
    base = tiny_model(family)
    folders = [save_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    expected = [peft_logits(base, IDS[:2], folder) for folder in folders]
    model = IA3Model(base)
    for index, folder in enumerate(folders):
        model.load_adapter(folder, str(index))
    with torch.no_grad():
        rows = model(IDS[:2], adapter_names=["0", "1"]).logits
    assert torch.equal(rows[0], expected[0][0])
    assert torch.equal(rows[1], expected[1][1])


def test_the_active_adapter_is_back_after_a_batch_of_rows(model: IA3Model, saved: Saved) -> None:
    model.set_adapter("default")
    with torch.no_grad():
        model(IDS[:2], adapter_names=["mlp", BASE_NAME])
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("default")))


def test_rows_may_change_places_between_batches(model: IA3Model, saved: Saved) -> None:
    expected = {kind: peft_logits(tiny_llama(), IDS, saved(kind)) for kind in ("mlp", "keys")}
    for kinds in (["mlp", "keys"], ["keys", "mlp"], ["keys"], ["mlp", "mlp", "keys"]):
        with torch.no_grad():
            rows = model(IDS[: len(kinds)], adapter_names=kinds).logits
        for index, kind in enumerate(kinds):
            assert torch.allclose(rows[index], expected[kind][index], atol=1e-5)


def test_generated_tokens_are_peft_s(model: IA3Model, saved: Saved) -> None:
    kinds = ["default", "mlp_out", "queries"]
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    rows = model.generate(IDS, adapter_names=kinds, **settings)
    for index, kind in enumerate(kinds):
        alone = with_peft(tiny_llama(), saved(kind)).generate(input_ids=IDS, **settings)
        assert rows[index].tolist()[:20] == alone[index].tolist()[:20]
        model.set_adapter(kind)
        assert torch.equal(model.generate(IDS, **settings), alone)


# Its life


def test_without_an_active_adapter_it_is_the_plain_model_bit_for_bit(model: IA3Model) -> None:
    assert torch.equal(logits(model, IDS), logits(tiny_llama(), IDS))
    model.set_adapter("default")
    model.set_adapter(BASE_NAME)
    assert torch.equal(logits(model, IDS), logits(tiny_llama(), IDS))


def test_disabled_layers_are_the_plain_model_until_enabled(model: IA3Model, saved: Saved) -> None:
    model.set_adapter("default")
    model.disable_adapter_layers()
    assert torch.equal(logits(model, IDS), logits(tiny_llama(), IDS))
    model.enable_adapter_layers()
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("default")))


def test_an_adapter_set_while_disabled_works_once_enabled(model: IA3Model, saved: Saved) -> None:
    model.disable_adapter_layers()
    model.set_adapter("mlp")
    assert torch.equal(logits(model, IDS), logits(tiny_llama(), IDS))
    model.enable_adapter_layers()
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("mlp")))


def test_deleting_an_adapter_leaves_the_other_active_ones(model: IA3Model, saved: Saved) -> None:
    model.set_adapter(["default", "queries"])
    model.delete_adapter("default")
    assert "default" not in model.adapter_names
    assert model.active_adapters == ["queries"]
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("queries")))


def test_without_another_active_one_the_first_by_name_takes_over(saved: Saved) -> None:
    """PEFT does the same. Without any other adapter, the base answers."""
    model = IA3Model(tiny_llama())
    for kind in ("mlp", "keys", "default"):
        model.load_adapter(saved(kind), kind)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to keys"):
        model.delete_adapter("default")
    assert model.active_adapters == ["keys"]
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("keys")))
    model.delete_adapter("mlp")
    model.delete_adapter("keys")
    assert model.active_adapters == []
    assert torch.equal(logits(model, IDS), logits(tiny_llama(), IDS))


def test_a_deleted_adapter_s_name_is_free_again(saved: Saved) -> None:
    model = IA3Model(tiny_llama())
    model.load_adapter(saved("default"), "a")
    model.delete_adapter("a")
    model.load_adapter(saved("keys"), "a")
    model.set_adapter("a")
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("keys")))


def test_unloading_gives_the_original_modules_back(saved: Saved) -> None:
    base = tiny_llama()
    modules = dict(base.named_modules())
    model = IA3Model(base)
    model.load_adapter(saved("everything"), "a")
    model.set_adapter("a")
    assert dict(base.named_modules()).keys() != modules.keys()

    assert model.unload() is base
    assert dict(base.named_modules()) == modules
    assert torch.equal(logits(base, IDS), logits(tiny_llama(), IDS))
    assert (model.adapter_names, model.active_adapters) == ([], [])


def test_adapters_can_be_loaded_again_after_unloading(model: IA3Model, saved: Saved) -> None:
    model.set_adapter(["default", "keys"])
    model.unload()
    for kind in ("queries", "mlp"):
        model.load_adapter(saved(kind), kind)
        model.set_adapter(kind)
        expected = peft_logits(tiny_llama(), IDS, saved(kind))
        assert torch.equal(logits(model, IDS), expected)


def test_an_adapter_attached_later_does_not_disturb_the_active_one(saved: Saved) -> None:
    model = IA3Model(tiny_llama())
    model.load_adapter(saved("keys"), "a")
    model.set_adapter("a")
    model.load_adapter(saved("everything"), "b")
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, saved("keys")))


def test_a_copy_of_the_model_computes_the_same(model: IA3Model, saved: Saved) -> None:
    model.set_adapter("default")
    twin = copy.deepcopy(model)
    model.set_adapter("mlp")
    assert torch.equal(logits(twin, IDS), peft_logits(tiny_llama(), IDS, saved("default")))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter("nobody"),
        lambda model: model.set_adapter(["default", "nobody"]),
        lambda model: model.delete_adapter("nobody"),
        lambda model: model.delete_adapter(BASE_NAME),
        lambda model: model(IDS, adapter_names=["default", "nobody", "default"]),
        lambda model: model.generate(IDS, adapter_names=["nobody"]),
    ],
    ids=["set", "set several", "delete", "delete the base", "rows", "generate"],
)
def test_an_unknown_name_is_refused_and_changes_nothing(
    model: IA3Model, use: Callable[[IA3Model], object]
) -> None:
    model.set_adapter("keys")
    before = logits(model, IDS)
    with pytest.raises(UnknownAdapter, match=r"nobody|__base__"):
        use(model)
    assert model.active_adapters == ["keys"]
    assert torch.equal(logits(model, IDS), before)


@pytest.mark.parametrize("name", ["default", BASE_NAME])
def test_a_taken_name_is_refused(model: IA3Model, saved: Saved, name: str) -> None:
    with pytest.raises(AdapterExists, match=name):
        model.load_adapter(saved("keys"), name)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(hidden_size=64), tmp_path)
    model = IA3Model(tiny_llama())
    with pytest.raises(InvalidAdapter, match="has shape"):
        model.load_adapter(folder, "a")
    assert model.adapter_names == []
