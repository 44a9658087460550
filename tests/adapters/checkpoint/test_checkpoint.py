"""An adapter's files: written by PEFT, read and checked by us, read again by PEFT."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save, save_file

from infuse.adapters.checkpoint.checkpoint import (
    WEIGHTS_FILE,
    AdapterVectors,
    Checkpoint,
    base_mismatch_warning,
    effective_vectors,
    product,
    read_checkpoint,
    write_checkpoint,
)
from infuse.adapters.checkpoint.config import CONFIG_FILE, IA3Config
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target
from infuse.adapters.errors import InvalidAdapter
from tests.factories import save_adapter, tiny_llama

MODULES = BaseModules.of(tiny_llama())
KEY = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"
DOWN = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter with PEFT's default targets."""
    return save_adapter(tiny_llama(), tmp_path / "adapter")


def vectors_of(folder: Path) -> AdapterVectors:
    return effective_vectors(read_checkpoint(folder), MODULES)


def change_weights(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


def change_config(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).write_text(json.dumps(values | fields))


def faults_of(folder: Path) -> dict[str, str]:
    with pytest.raises(InvalidAdapter) as refusal:
        vectors_of(folder)
    return {fault.field: str(fault) for fault in refusal.value.faults}


# PEFT -> Infuse -> PEFT

TRAINED: list[dict[str, Any]] = [
    {},
    {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    {"target_modules": r".*\.[qv]_proj", "feedforward_modules": []},
    {"target_modules": "all-linear", "feedforward_modules": r".*down_proj"},
    {"exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"exclude_modules": r".*\.0\..*"},
    {"modules_to_save": ["lm_head"]},
]
"""The config fields that determine the tensors."""

NOTED: list[dict[str, Any]] = [
    {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
    {"base_model_name_or_path": "someone/some-model"},
    {"revision": "main"},
    {"task_type": None},
    {"task_type": "SEQ_2_SEQ_LM"},
    {"inference_mode": False},
    {"fan_in_fan_out": True},
    {"init_ia3_weights": False},
]
"""Config fields that PEFT changes as it saves, or does not write: set in the file afterwards."""


def round_trip(before: Path, after: Path) -> peft.IA3Config:
    write_checkpoint(read_checkpoint(before), after)
    theirs, ours = load_file(before / WEIGHTS_FILE), load_file(after / WEIGHTS_FILE)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert all(theirs[key].dtype == ours[key].dtype for key in theirs)
    config = peft.IA3Config.from_pretrained(str(after))
    assert config == peft.IA3Config.from_pretrained(str(before))
    return config


@pytest.mark.parametrize("fields", TRAINED, ids=str)
def test_an_adapter_comes_back_from_us_to_peft_with_equal_tensors_and_config(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    before = save_adapter(tiny_llama(), tmp_path / "before", **fields)
    round_trip(before, tmp_path / "after")


@pytest.mark.parametrize("fields", NOTED, ids=str)
def test_a_field_that_changes_no_tensor_comes_back_too(
    fields: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    config = peft.IA3Config.from_pretrained(str(folder))
    vars(config).update(fields)
    config.save_pretrained(str(folder))
    assert fields.items() <= vars(round_trip(folder, tmp_path / "after")).items()


def test_the_round_trips_cover_every_field_of_peft_s_config() -> None:
    covered = {field for fields in TRAINED + NOTED for field in fields}
    assert covered == set(peft.IA3Config().to_dict()) - {"peft_type", "peft_version"}


def test_what_peft_saves_but_cannot_read_again_is_refused(tmp_path: Path) -> None:
    """`all-linear` is saved as full names, of which the default feed-forward suffix is none."""
    folder = save_adapter(tiny_llama(), tmp_path, target_modules="all-linear")
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config.from_pretrained(str(folder))
    assert "subset" in faults_of(folder)["feedforward_modules"]


def test_peft_computes_the_same_with_the_files_that_we_wrote(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(read_checkpoint(folder), tmp_path / "ours")
    ids = torch.arange(12).view(1, 12)
    before = PeftModel.from_pretrained(tiny_llama(), folder)(ids).logits
    after = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")(ids).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_vectors_of_every_float_type_load_as_float32(folder: Path, dtype: torch.dtype) -> None:
    saved: Tensors = {}
    change_weights(folder, lambda t: saved.update(t) or t.update({k: t[k].to(dtype) for k in t}))
    for target, vector in vectors_of(folder).vectors.items():
        key = f"base_model.model.{target.module}.ia3_l"
        assert vector.dtype == torch.float32
        assert torch.equal(vector, saved[key].to(dtype).float().flatten())


def test_the_bytes_of_an_adapter_are_those_of_its_vectors(folder: Path) -> None:
    sizes = [16, 16, 64] * 2
    assert vectors_of(folder).nbytes == 4 * sum(sizes)


# What an adapter does


def test_what_does_the_same_has_the_same_digest(tmp_path: Path) -> None:
    by_list = save_adapter(tiny_llama(), tmp_path / "a")
    by_regex = save_adapter(
        tiny_llama(), tmp_path / "b", target_modules=r".*\.(k_proj|v_proj|down_proj)"
    )
    assert (by_list / CONFIG_FILE).read_bytes() != (by_regex / CONFIG_FILE).read_bytes()
    assert vectors_of(by_list).digest == vectors_of(by_regex).digest


def test_the_dtype_and_the_order_of_the_file_do_not_change_the_digest(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({key: t[key].bfloat16() for key in t}))
    narrow = vectors_of(folder).digest
    change_weights(folder, lambda t: t.update({key: t.pop(key).float() for key in sorted(t)[::-1]}))
    assert vectors_of(folder).digest == narrow


def test_another_value_side_or_module_has_another_digest() -> None:
    ones = torch.ones(32)
    many = [
        AdapterVectors({}),
        AdapterVectors({Target("a", Side.OUTPUT): ones}),
        AdapterVectors({Target("a", Side.INPUT): ones}),
        AdapterVectors({Target("b", Side.OUTPUT): ones}),
        AdapterVectors({Target("a", Side.OUTPUT): torch.ones(31)}),
        AdapterVectors({Target("a", Side.OUTPUT): torch.nextafter(ones, 2 * ones)}),
        AdapterVectors({Target("a", Side.OUTPUT): ones, Target("b", Side.OUTPUT): ones}),
    ]
    assert len({each.digest for each in many}) == len(many)


def test_a_product_has_the_modules_of_all_its_factors() -> None:
    a, b, c = (Target(name, Side.OUTPUT) for name in "abc")
    left = AdapterVectors({a: torch.tensor([2.0]), b: torch.tensor([3.0])})
    right = AdapterVectors({b: torch.tensor([5.0]), c: torch.tensor([7.0])})
    assert {t.module: v.item() for t, v in product([left, right]).vectors.items()} == {
        "a": 2.0,
        "b": 15.0,
        "c": 7.0,
    }


# What an upload must pass


def test_no_files_is_two_faults(tmp_path: Path) -> None:
    faults = faults_of(tmp_path)
    assert list(faults) == [CONFIG_FILE, WEIGHTS_FILE]
    assert all("is missing" in fault and "save_pretrained" in fault for fault in faults.values())


def test_faults_of_both_files_stand_in_one_answer(folder: Path) -> None:
    change_config(folder, inference_mode="no", revision=3)
    (folder / WEIGHTS_FILE).write_bytes(b"nonsense")
    assert list(faults_of(folder)) == ["revision", "inference_mode", WEIGHTS_FILE]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["adapter_model.bin", WEIGHTS_FILE])
def test_pickled_weights_are_refused_with_the_way_to_convert(
    folder: Path, name: str, zipped: bool
) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).unlink()
    torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
    fault = faults_of(folder)[WEIGHTS_FILE]
    assert "pickled" in fault
    assert "safe_serialization=True" in fault


def test_a_pickle_is_not_even_opened(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "trapped",)

    (folder / WEIGHTS_FILE).unlink()
    torch.save(Trap(), folder / WEIGHTS_FILE)
    faults_of(folder)
    assert not (tmp_path / "trapped").exists()


def test_weights_whose_file_begins_like_a_pickle_are_read(folder: Path) -> None:
    """The first bytes are the header's length."""
    tensors = load_file(folder / WEIGHTS_FILE)
    first = set()
    for length in range(0, 256, 8):
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"note": "x" * length})
        first.add((folder / WEIGHTS_FILE).read_bytes()[0])
        assert read_checkpoint(folder).tensors.keys() == tensors.keys()
    assert 0x80 in first


def test_a_wrong_shape_is_named_with_the_right_one(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({KEY: torch.ones(17, 1), DOWN: torch.ones(64, 1)}))
    faults = faults_of(folder)
    assert "has shape (17, 1), and the base model's layer needs (16, 1)" in faults[KEY]
    assert "has shape (64, 1), and the base model's layer needs (1, 64)" in faults[DOWN]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_counted(folder: Path, value: float) -> None:
    change_weights(folder, lambda t: t[KEY][3:5].fill_(value))
    assert "2 of 16 values are NaN or infinite" in faults_of(folder)[KEY]


def test_values_are_finite_even_where_their_sum_is_not(folder: Path) -> None:
    change_weights(folder, lambda t: t[KEY].fill_(3e38))
    vectors = vectors_of(folder).vectors
    assert max(float(vector.max()) for vector in vectors.values()) > 2e38


def test_a_value_too_large_for_float32_is_refused(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({KEY: torch.ones(16, 1).double() * 1e300}))
    assert "16 of 16 values" in faults_of(folder)[KEY]


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.complex64])
def test_a_dtype_that_is_not_floating_is_refused(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda t: t.update({KEY: torch.ones(16, 1, dtype=dtype)}))
    assert f"has dtype {dtype}" in faults_of(folder)[KEY]


def test_an_unknown_key_is_answered_with_the_nearest_one(folder: Path) -> None:
    typo = KEY.replace("k_proj", "k_porj")
    change_weights(folder, lambda t: t.update({typo: t.pop(KEY)}))
    faults = faults_of(folder)
    assert f"did you mean {KEY}?" in faults[typo]
    assert f"is missing in {WEIGHTS_FILE}" in faults[KEY]


def test_a_key_unlike_any_other_is_told_the_form_of_keys(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({"Q" * 500: torch.ones(1)}))
    [(shown, fault)] = faults_of(folder).items()
    assert "base_model.model.<module>.ia3_l" in fault
    assert len(shown) == 200


def test_a_copy_of_the_head_is_refused_with_the_way_to_save_without_it(tmp_path: Path) -> None:
    """PEFT saves the weights of a targeted head or embedding too, unless told not to."""
    head = {"target_modules": ["lm_head"], "feedforward_modules": []}
    folder = save_adapter(tiny_llama(), tmp_path, with_head=True, **head)
    [fault] = faults_of(folder).values()
    assert "save_embedding_layers=False" in fault
    change_weights(folder, lambda t: t.pop("base_model.model.lm_head.base_layer.weight"))
    assert [target.module for target in vectors_of(folder).vectors] == ["lm_head"]


def test_an_adapter_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    larger = save_adapter(tiny_llama(num_hidden_layers=3), tmp_path)
    faults = faults_of(larger)
    assert len(faults) == 3
    assert all(".layers.2." in key for key in faults)


def test_many_faults_are_cut_short_and_counted(folder: Path) -> None:
    change_weights(folder, lambda t: t.update({f"stray {n}": torch.ones(1) for n in range(60)}))
    with pytest.raises(InvalidAdapter) as refusal:
        vectors_of(folder)
    assert len(refusal.value.faults) == 51
    assert "and 10 more faults" in str(refusal.value.faults[-1])


def test_different_faults_stand_in_one_answer(folder: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["stray"] = torch.ones(1)
        tensors[KEY][0] = float("nan")
        tensors[DOWN] = torch.ones(1, 3)
        del tensors[KEY.replace("k_proj", "v_proj")]

    change_weights(folder, spoil)
    assert faults_of(folder).keys() == {"stray", KEY, DOWN, KEY.replace("k_proj", "v_proj")}


WHOLE = save({KEY: torch.ones(16, 1), DOWN: torch.ones(1, 64)})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 8,
        WHOLE[:-1],
        WHOLE[:20],
        WHOLE + b"more",
        struct.pack("<Q", 1 << 62) + WHOLE[8:],
        struct.pack("<Q", 1) + WHOLE[8:],
        WHOLE.replace(b"[16,1]", b"[99,1]"),
        WHOLE.replace(b'"F32"', b'"F99"'),
        WHOLE.replace(b'"F32"', b'"C64"'),
        WHOLE.replace(b"[16,1]", b"[-1,1]"),
    ],
    ids=range(11),
)
def test_a_damaged_file_is_refused(folder: Path, data: bytes) -> None:
    (folder / WEIGHTS_FILE).write_bytes(data)
    assert "damaged" in faults_of(folder)[WEIGHTS_FILE]


@given(
    st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3),
    st.integers(0, len(WHOLE)),
)
def test_whatever_bytes_arrive_they_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    folder = tmp_path_factory.mktemp("bytes")
    (folder / CONFIG_FILE).write_bytes(IA3Config().dump())
    (folder / WEIGHTS_FILE).write_bytes(data if changes else data[:length])
    with pytest.raises(InvalidAdapter):
        vectors_of(folder)


def test_a_config_without_a_match_is_a_fault(folder: Path) -> None:
    change_config(folder, target_modules=["query"], feedforward_modules=[])
    assert list(faults_of(folder)) == ["target_modules"]


# Another base


@pytest.mark.parametrize("trained", [None, "", "served", "someone/served", "/models/Served"])
def test_a_base_of_the_same_name_is_no_warning(trained: str | None) -> None:
    assert base_mismatch_warning(IA3Config(base_model_name_or_path=trained), "served") is None


def test_another_base_is_a_warning_that_names_both() -> None:
    warning = base_mismatch_warning(IA3Config(base_model_name_or_path="org/other"), "served")
    assert warning is not None
    assert "'org/other'" in warning
    assert "'served'" in warning


def test_a_folder_that_is_there_already_is_written_over(folder: Path) -> None:
    checkpoint = Checkpoint(IA3Config(revision="new"), {"key": torch.ones(4, 2).T})
    write_checkpoint(checkpoint, folder)
    again = read_checkpoint(folder)
    assert again.config == checkpoint.config
    assert torch.equal(again.tensors["key"], checkpoint.tensors["key"])
