"""A notebook that runs on `peft.IA3Model`, or `PeftModel` around it, runs on ours by its import."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification

from infuse import adapters
from infuse.adapters.checkpoint.config import CONFIG_FILE
from infuse.adapters.errors import AdapterError, CannotCombine, InvalidAdapter, WrongCall, WrongType
from infuse.adapters.model.model import NOT_SERVED, IA3Model
from tests.adapters.oracle import logits, peft_logits
from tests.adapters.tiny_t5 import tiny_t5
from tests.factories import save_adapter, tiny_llama, tiny_model

IDS = torch.randint(3, 128, (3, 6), generator=torch.Generator().manual_seed(3))
CONFIG: dict[str, Any] = {
    "target_modules": ["k_proj", "v_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}
SHORT: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(tiny_llama(), root / str(seed), seed=seed) for seed in (1, 2)]


@pytest.fixture
def model(folders: list[Path]) -> IA3Model:
    model = IA3Model.from_pretrained(tiny_llama(), folders[0], "a")
    model.load_adapter(folders[1], "b")
    return model


def test_both_imports_are_the_package_s() -> None:
    assert adapters.IA3Model is IA3Model
    assert adapters.IA3Config(**CONFIG).peft_type == "IA3"


@pytest.mark.parametrize("kind", [peft.IA3Model, PeftModel])
def test_all_that_peft_s_models_have_is_there_or_says_what_to_do(kind: type, model: Any) -> None:
    for name in set(dir(kind)) - set(dir(nn.Module)):
        if name.startswith("_"):
            continue
        if name not in NOT_SERVED:
            getattr(model, name)
            continue
        with pytest.raises(AttributeError, match=f"IA3Model has no {name}: "):
            getattr(model, name)


def test_attributes_are_the_base_model_s(model: Any) -> None:
    assert model.config is model.model.config
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.base_model.model is model.get_base_model() is model.model
    assert model.active_adapter == "a"
    assert set(model.active_peft_config.target_modules) == set(CONFIG["target_modules"])
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing


# All or nothing


def test_adapters_that_cannot_be_together_leave_the_active_one_in_force(tmp_path: Path) -> None:
    """A call that fails must not leave both active: the next calls would raise half-way."""
    base = tiny_llama()
    whole = [
        save_adapter(base, tmp_path / name, seed, modules_to_save=["lm_head"], **CONFIG)
        for seed, name in enumerate("st")
    ]
    model = IA3Model(tiny_llama())
    for folder in whole:
        model.load_adapter(folder, folder.name)
    model.set_adapter("s")
    before = logits(model, IDS)
    with pytest.raises(CannotCombine):
        model.set_adapter(["s", "t"])
    assert model.active_adapters == ["s"]
    assert torch.equal(logits(model, IDS), before)
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert torch.equal(logits(model, IDS), before)
    model.delete_adapter("t")
    with torch.no_grad():
        model(IDS, adapter_names=["s", "__base__", "s"])
        assert torch.allclose(model(IDS[:1]).logits, before[:1], atol=1e-5)


def test_a_forward_that_fails_leaves_no_rows_behind(model: IA3Model) -> None:
    before = logits(model, IDS)
    with pytest.raises(IndexError):
        model(torch.full((3, 4), 10_000), adapter_names=["a", "b", "a"])
    assert torch.equal(logits(model, IDS), before)


# Each row its own, as PEFT has it for LoRA


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_beams_and_returned_sequences_use_their_row_s_adapter(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_t5() if family == "t5" else tiny_model(family)
    base.generation_config.decoder_start_token_id = 0
    ids = IDS % 60 + 3
    model = IA3Model(copy.deepcopy(base))
    folders = [save_adapter(base, tmp_path / str(seed), seed=seed) for seed in range(2)]
    for folder in folders:
        model.load_adapter(folder, folder.name)
    found = model.generate(ids, adapter_names=["0", "1", "__base__"], **SHORT, **settings)
    each = len(found) // 3
    for row, name in enumerate(["0", "1", "__base__"]):
        model.set_adapter(name)
        alone = model.generate(ids, **SHORT, **settings)
        mine = slice(each * row, each * (row + 1))
        assert torch.equal(found[mine], alone[mine]), name


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
def test_beams_with_a_module_of_their_own(settings: dict[str, Any], tmp_path: Path) -> None:
    saved = {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}
    folder = save_adapter(tiny_llama(), tmp_path, **CONFIG, **saved)
    model = IA3Model.from_pretrained(tiny_llama(), folder)
    names = ["default", "__base__", "default"]
    found = model.generate(IDS, adapter_names=names, **SHORT, **settings)
    alone = model.generate(IDS, **SHORT, **settings)
    assert torch.equal(found[0], alone[0])
    assert torch.equal(found[2], alone[2])
    with model.disable_adapter():
        assert torch.equal(found[1], model.generate(IDS, **SHORT, **settings)[1])


REFUSALS: dict[str, tuple[Callable[[IA3Model], object], Any, type[Exception]]] = {
    "too few": (lambda model: model.eval(), ["a"], ValueError),
    "too many": (lambda model: model.eval(), ["a", "b", "a", "b"], ValueError),
    "a plain string": (lambda model: model.eval(), "abb", TypeError),
    "an unknown name": (lambda model: model.eval(), ["a", "b", "nobody"], ValueError),
    "train mode": (lambda model: model.train(), ["a", "b", "a"], ValueError),
    "merged": (lambda model: model.merge_adapter(), ["a", "b", "a"], ValueError),
}


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_adapter_names_are_refused_as_for_peft_s_lora(
    model: IA3Model, refusal: str, call: str
) -> None:
    prepare, names, kind = REFUSALS[refusal]
    prepare(model)
    with pytest.raises(kind) as refused:
        getattr(model, call)(IDS, adapter_names=names)
    assert isinstance(refused.value, AdapterError)

    if call == "forward" and kind is ValueError:
        lora = get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM"), "a").eval()
        lora.add_adapter("b", peft.LoraConfig(task_type="CAUSAL_LM"))
        prepare(lora)  # type: ignore[arg-type]
        with pytest.raises(kind) as theirs:
            lora(input_ids=IDS, adapter_names=names)
        if refusal != "an unknown name":
            assert str(refused.value) == str(theirs.value)


def test_adapter_names_are_the_base_s_while_disabled(model: IA3Model) -> None:
    plain = logits(tiny_llama(), IDS)
    with model.disable_adapter():
        assert torch.equal(logits(model, IDS, adapter_names=["a", "b", "a"]), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_vectors_move_with_the_model_as_peft_s(folders: list[Path], dtype: torch.dtype) -> None:
    ours = IA3Model.from_pretrained(tiny_llama(), folders[0], "a").to(dtype)
    theirs = PeftModel.from_pretrained(tiny_llama(), folders[0], "a").to(dtype)
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ours, theirs = ours.float(), theirs.float()
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))


# What a notebook calls


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_two_merged_adapters_are_rounded_after_each_as_in_peft(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = tiny_model(family).to(dtype)
    folders = [save_adapter(base, tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], "a")
    theirs.load_adapter(folders[1], "b")
    ours = IA3Model.from_pretrained(base, folders[0], "a")
    ours.load_adapter(folders[1], "b")
    merged = theirs.merge_and_unload(adapter_names=["a", "b"], safe_merge=True)
    mine = ours.merge_and_unload(adapter_names=["a", "b"], safe_merge=True)
    assert mine is base
    wanted = merged.state_dict()
    assert mine.state_dict().keys() == wanted.keys()
    for key, tensor in mine.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


def test_a_safe_merge_that_finds_infinity_changes_nothing(model: IA3Model) -> None:
    last = [p for name, p in model.named_parameters() if name.endswith("ia3_l.a")][-1]
    last.data[0] = torch.inf
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(WrongCall, match="nothing was merged"):
        model.merge_and_unload(safe_merge=True)
    assert model.merged_adapters == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_a_tied_head_gets_a_weight_of_its_own_and_gives_it_back(tmp_path: Path) -> None:
    """PEFT's merge scales the embeddings too."""
    base = tiny_llama(tie_word_embeddings=True)
    head = {"target_modules": ["lm_head"], "feedforward_modules": []}
    model = IA3Model.from_pretrained(base, save_adapter(base, tmp_path, **head))
    expected = logits(model, IDS)
    model.merge_adapter()
    assert torch.allclose(logits(model, IDS), expected, atol=1e-5)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    merged = model.merge_and_unload()
    assert torch.allclose(logits(merged, IDS), expected, atol=1e-5)
    assert not merged.config.tie_word_embeddings


def test_merging_leaves_the_active_adapter_s_own_modules(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path, modules_to_save=["lm_head"], **CONFIG)
    model = IA3Model.from_pretrained(tiny_llama(), folder)
    expected = logits(model, IDS)
    assert torch.allclose(logits(model.merge_and_unload(), IDS), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "support", "v1.5", "keys"])
def test_what_it_saves_peft_loads(name: str, folders: list[Path], tmp_path: Path) -> None:
    model = IA3Model.from_pretrained(tiny_llama(), folders[0], name)
    model.save_pretrained(tmp_path)
    written = tmp_path if name == "default" else tmp_path / name
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, written))
    again = IA3Model.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_whole_modules_are_saved_as_peft_saves_them(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path / "x", modules_to_save=["norm"], **CONFIG)
    model = IA3Model.from_pretrained(tiny_llama(), folder)
    model.save_pretrained(tmp_path / "y")
    expected = peft_logits(tiny_llama(), IDS, folder)
    assert torch.equal(peft_logits(tiny_llama(), IDS, tmp_path / "y"), expected)


@pytest.mark.parametrize("saved", [None, ["norm"]])
def test_it_trains_as_peft_does(saved: list[str] | None, tmp_path: Path) -> None:
    """The README of a notebook: a config, an optimiser, a few steps, save."""
    settings: dict[str, Any] = {**CONFIG, "modules_to_save": saved, "task_type": "CAUSAL_LM"}
    ours = IA3Model(tiny_llama(), adapters.IA3Config(**settings))
    theirs = get_peft_model(tiny_llama(), peft.IA3Config(**settings))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.SGD(trained, lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimiser.step()
    assert torch.equal(logits(ours, IDS), logits(theirs, IDS))
    assert not torch.allclose(logits(ours, IDS), logits(tiny_llama(), IDS), atol=1e-3)
    ours.save_pretrained(tmp_path)
    assert torch.equal(peft_logits(tiny_llama(), IDS, tmp_path), logits(ours, IDS))


def test_it_takes_peft_s_own_config(capsys: pytest.CaptureFixture[str]) -> None:
    model = IA3Model(tiny_llama(), peft.IA3Config(task_type="CAUSAL_LM"), "default")
    assert model.peft_config["default"].target_modules == ["k_proj", "v_proj", "down_proj"]
    assert model.active_adapter == "default"
    theirs = peft.IA3Model(tiny_llama(), peft.IA3Config(), "default")
    assert model.targeted_module_names == theirs.targeted_module_names
    assert model.state_dict().keys() == theirs.state_dict().keys()
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 192 || all params: ")


def test_a_mixture_of_adapters_that_disagree_about_a_side_is_saved_and_loaded(
    tmp_path: Path,
) -> None:
    """PEFT's layers have one side, so its own sum fails there."""
    model = IA3Model(tiny_llama())
    for name, inputs in (("out", []), ("in", ["down_proj"])):
        config = {"target_modules": ["down_proj"], "feedforward_modules": inputs}
        model.load_adapter(save_adapter(tiny_llama(), tmp_path / name, **config), name)
    model.add_weighted_adapter(["out", "in"], [0.5, 0.25], "mixed")
    model.set_adapter("mixed")
    model.save_pretrained(tmp_path / "x", selected_adapters=["mixed"])
    again = IA3Model.from_pretrained(tiny_llama(), tmp_path / "x")
    assert torch.equal(logits(again, IDS), logits(model, IDS))


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.add_weighted_adapter(["a"], [1.0, 2.0], "c"),
        lambda model: model.add_weighted_adapter([], [], "c"),
        lambda model: model.add_weighted_adapter(["a"], [1.0], "b"),
        lambda model: model.add_weighted_adapter(["a"], [1e39], "c"),
        lambda model: model.save_pretrained(".", safe_serialization=False),
        lambda model: model.save_pretrained(Path(__file__)),
        lambda model: model.merge_adapter("a"),
        lambda model: model.add_adapter("c", {"target_modules": ["k_proj"]}),
        lambda model: model.add_adapter("", adapters.IA3Config(**CONFIG)),
        lambda model: model.set_requires_grad(["nobody"]),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(
    model: IA3Model, call: Callable[[IA3Model], object]
) -> None:
    before = logits(model, IDS)
    with pytest.raises(AdapterError):
        call(model)
    assert model.adapter_names == ["a", "b"]
    assert torch.equal(logits(model, IDS), before)


def test_a_plain_module_is_refused_with_the_reason() -> None:
    with pytest.raises(WrongType, match="PreTrainedModel, and Sequential is none"):
        IA3Model(nn.Sequential(nn.Linear(2, 2)), adapters.IA3Config(**CONFIG))  # type: ignore[arg-type]


def test_convolutions_are_refused_with_the_reason() -> None:
    config = AutoConfig.for_model(
        "resnet", embedding_size=4, hidden_sizes=[8], depths=[1], layer_type="basic"
    )
    images = AutoModelForImageClassification.from_config(config)
    with pytest.raises(InvalidAdapter, match="convolution' is no linear layer but a Conv2d"):
        IA3Model(images, adapters.IA3Config(target_modules=["convolution"], feedforward_modules=[]))


def test_files_name_what_peft_s_name(folders: list[Path], tmp_path: Path) -> None:
    IA3Model.from_pretrained(tiny_llama(), folders[0]).save_pretrained(tmp_path)
    theirs = json.loads((folders[0] / CONFIG_FILE).read_text())
    assert json.loads((tmp_path / CONFIG_FILE).read_text()).keys() == theirs.keys()


def test_a_sum_that_is_not_finite_is_refused_as_peft_refuses_values(model: IA3Model) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("layers.1.self_attn.k_proj.ia3_l.a"):
            parameter.data[0] = torch.inf
    before = model.peft_config.keys()

    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj is not finite"):
        model.add_weighted_adapter(["a"], [0.0], "sum")
    assert model.peft_config.keys() == before
