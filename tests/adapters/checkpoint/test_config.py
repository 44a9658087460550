"""PEFT's config, read, checked and written back."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infuse.adapters.checkpoint.config import CONFIG_FILE, MAX_CONFIG_BYTES, IA3Config
from infuse.adapters.errors import InvalidAdapter

FIELDS: list[dict[str, Any]] = [
    {},
    {"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}},
    {"base_model_name_or_path": "someone/some-model"},
    {"revision": "main"},
    *({"task_type": task} for task in ("CAUSAL_LM", "SEQ_2_SEQ_LM", None)),
    {"inference_mode": True},
    {"target_modules": ["k_proj", "v_proj"]},
    {"target_modules": r".*\.(k|v)_proj"},
    {"target_modules": "all-linear"},
    {"exclude_modules": ["layers.0.self_attn.k_proj"]},
    {"exclude_modules": r".*\.0\..*"},
    {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    {"target_modules": ["k_proj"], "feedforward_modules": []},
    {"feedforward_modules": r".*down_proj"},
    {"fan_in_fan_out": True},
    {"modules_to_save": ["lm_head"]},
    {"init_ia3_weights": False},
]


def peft_file(folder: Path, **fields: Any) -> bytes:
    peft.IA3Config(**fields).save_pretrained(str(folder))
    return (folder / CONFIG_FILE).read_bytes()


def faults_of(values: object) -> dict[str, str]:
    with pytest.raises(InvalidAdapter) as refusal:
        IA3Config.parse(json.dumps(values).encode())
    return {fault.field: fault.problem for fault in refusal.value.faults}


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_config_of_peft_comes_back_equal_in_every_field(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    written = peft_file(tmp_path / "by_peft", **fields)
    (tmp_path / CONFIG_FILE).write_bytes(IA3Config.parse(written).dump())

    before = peft.IA3Config.from_pretrained(str(tmp_path / "by_peft"))
    after = peft.IA3Config.from_pretrained(str(tmp_path))
    assert after == before
    assert after.peft_type == peft.PeftType.IA3


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_the_file_keeps_peft_s_order_and_values(fields: dict[str, Any], tmp_path: Path) -> None:
    written = peft_file(tmp_path, **fields)
    assert IA3Config.parse(written).dump() == written


def test_every_field_of_peft_s_config_is_read(tmp_path: Path) -> None:
    config = IA3Config.parse(peft_file(tmp_path))
    unread = set(peft.IA3Config().to_dict()) - set(IA3Config.model_fields)
    assert unread == {"peft_version"}
    assert config.model_extra == {"peft_version": peft.__version__}


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # json reads a lone half of a surrogate pair, so an adapter's file may hold one.
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(min_size=1), JSON_VALUES, max_size=4))
def test_fields_that_are_unknown_are_kept(unknown: dict[str, Any]) -> None:
    values = {k: v for k, v in unknown.items() if k not in IA3Config.model_fields}
    file = json.dumps({"peft_type": "IA3", **values}).encode()
    dumped = json.loads(IA3Config.parse(file).dump())
    assert {key: dumped[key] for key in values} == values


def test_a_lone_surrogate_in_an_unknown_field_is_kept() -> None:
    file = rb'{"peft_type": "IA3", "note": "\ud800"}'
    assert json.loads(IA3Config.parse(file).dump())["note"] == "\ud800"


def test_an_unknown_field_may_be_nested_deeply() -> None:
    nested = "[" * 300 + "]" * 300
    file = f'{{"peft_type": "IA3", "note": {nested}}}'.encode()
    assert json.dumps(json.loads(IA3Config.parse(file).dump())["note"]) == nested


def test_feedforward_modules_outside_of_the_targets_are_refused() -> None:
    values = {"target_modules": ["k_proj"], "feedforward_modules": ["k_proj", "down_proj"]}
    with pytest.raises(ValueError, match="subset"):
        peft.IA3Config(**values)
    faults = faults_of({"peft_type": "IA3", **values})
    assert "['down_proj']" in faults["feedforward_modules"]


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ".*", "feedforward_modules": ["down_proj"]},
        {"target_modules": ["k_proj"], "feedforward_modules": "down_proj"},
        {"feedforward_modules": ["down_proj"]},
    ],
    ids=str,
)
def test_only_two_lists_are_compared_with_each_other(values: dict[str, Any]) -> None:
    peft.IA3Config(**values)
    IA3Config.parse(json.dumps({"peft_type": "IA3", **values}).encode())


@pytest.mark.parametrize("kind", ["LORA", "ia3", None, 3, ["IA3"], "x" * 5000], ids=repr)
def test_another_kind_of_adapter_is_refused_by_its_name(kind: object) -> None:
    problem = faults_of({"peft_type": kind})["peft_type"]
    assert json.dumps(kind)[:70] in problem
    assert len(problem) < 300


def test_a_config_without_a_kind_is_refused() -> None:
    assert list(faults_of({"target_modules": ["k_proj"]})) == ["peft_type"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"peft_type: IA3",
        b"\xff\xfe\xfa",
        b"[" * 100_000,
        b'{"peft_type": "IA3", "note": NaN}',
        b'{"peft_type": "IA3", "note": ' + b"9" * 5000 + b"}",
        b"[1, 2]",
        b'"IA3"',
        b"null",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter) as refusal:
        IA3Config.parse(data)
    assert [fault.field for fault in refusal.value.faults] == [CONFIG_FILE]
    assert "is no JSON" in str(refusal.value)


def test_a_config_of_more_than_a_mebibyte_is_refused() -> None:
    padding = " " * MAX_CONFIG_BYTES
    with pytest.raises(InvalidAdapter, match="more than a config's limit"):
        IA3Config.parse(f'{{"peft_type": "IA3"{padding}}}'.encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("auto_mapping", ["a"]),
        ("base_model_name_or_path", 3),
        ("revision", True),
        ("task_type", ["CAUSAL_LM"]),
        ("inference_mode", "yes"),
        ("target_modules", 3),
        ("target_modules", [3]),
        ("exclude_modules", {"a": 1}),
        ("feedforward_modules", [None]),
        ("fan_in_fan_out", 1),
        ("modules_to_save", "lm_head"),
        ("init_ia3_weights", "true"),
    ],
)
def test_a_field_of_a_wrong_type_is_named(field: str, value: object) -> None:
    assert list(faults_of({"peft_type": "IA3", field: value})) == [field]


def test_all_wrong_fields_stand_in_one_answer() -> None:
    wrong = {"revision": 1, "target_modules": 3, "inference_mode": "no", "modules_to_save": {}}
    assert faults_of({"peft_type": "IA3", **wrong}).keys() == wrong.keys()


def test_many_names_are_read_in_little_more_than_their_number() -> None:
    names = [f"layer{number}" for number in range(20_000)]
    config = {"peft_type": "IA3", "target_modules": names}
    feedforward = [f"model.{name}" for name in names]

    # Comparing each name with each other one would take minutes, and the test's time would be over.
    read = IA3Config.parse(json.dumps(config | {"feedforward_modules": feedforward}).encode())

    assert len(read.feedforward_modules or ()) == len(names)
