"""A config adapts the modules that PEFT wraps, on the same side."""

import copy
import threading
import time
import warnings
from dataclasses import replace
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.ia3.layer import IA3Layer
from peft.utils import constants
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.peft_defaults import FEEDFORWARD_MODULES, TARGET_MODULES
from infuse.adapters.checkpoint.targets import BaseModules, Side, resolve_targets
from infuse.adapters.errors import InvalidAdapter
from tests.adapters.tiny_t5 import tiny_t5
from tests.factories import tiny_model

BASES: dict[str, PreTrainedModel] = {
    "llama": tiny_model("llama"),
    "gpt2": tiny_model("gpt2"),
    "opt": tiny_model("opt"),
    "t5": tiny_t5(),
}
MODULES = {family: BaseModules.of(base) for family, base in BASES.items()}
FIELDS = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save")

Sides = dict[str, str] | None
"""Module -> "input" or "output"; None where the config is refused."""


def sides_of_peft(family: str, **fields: Any) -> Sides:
    """Return what PEFT wraps, by the shape of its vector."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.IA3Config(**fields)
            model = peft.IA3Model(copy.deepcopy(BASES[family]), config, "default")
    except (ValueError, TypeError):
        return None
    return {
        name.removeprefix("model."): "input" if layer.is_feedforward else "output"
        for name, layer in model.named_modules()
        if isinstance(layer, IA3Layer)
    }


def our_sides(family: str, **fields: Any) -> Sides:
    try:
        targets = resolve_targets(IA3Config(**fields), MODULES[family])
    except (ValueError, InvalidAdapter):
        return None
    return {target.module: str(target.side) for target in targets}


def faults_of(family: str, **fields: Any) -> list[str]:
    with pytest.raises(InvalidAdapter) as refusal:
        resolve_targets(IA3Config(**fields), MODULES[family])
    return [str(fault) for fault in refusal.value.faults]


def suffixes(names: tuple[str, ...]) -> list[str]:
    """Every suffix of every module's path, whole parts and a bare end of one."""
    parts = [name.split(".") for name in names]
    whole = {".".join(part[start:]) for part in parts for start in range(len(part))}
    return sorted(whole | {suffix[-4:] for suffix in whole} | {"nothing", ""})


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    family = draw(st.sampled_from(sorted(BASES)))
    modules = MODULES[family]
    linear = suffixes(tuple(modules.sizes))
    some = st.lists(st.sampled_from(linear), max_size=4)
    patterns = st.sampled_from(linear).map(lambda end: f".*{end}") | st.sampled_from(
        [r".*(k|v|q)(_proj)?", r".*\.0\..*(proj|fc|wo|c_).*", r"(?i).*_PROJ", r"all-Linear", ""]
    )
    everywhere = st.lists(st.sampled_from(suffixes(modules.names)), max_size=2)
    saved = st.lists(
        st.sampled_from(["mlp", "self_attn", "lm_head", "k_proj", r"\w+_proj", "layers.0|h|k_proj"])
    )
    targets = draw(some | patterns | st.none())
    feedforward = st.lists(st.sampled_from(targets), max_size=2) if targets else st.just([])
    fields = {
        "target_modules": targets,
        "feedforward_modules": draw(feedforward | some | patterns | st.none()),
        "exclude_modules": draw(st.none() | everywhere | patterns),
        "modules_to_save": draw(st.none() | saved),
    }
    return family, fields


def with_whole_names(fields: dict[str, Any]) -> dict[str, Any]:
    """PEFT 0.14 and later shortened the targets that it wrote, and then refused the whole names of
    feed-forward modules beside them: here they are targets again."""
    targets, feedforward = fields["target_modules"], fields["feedforward_modules"]
    if not isinstance(targets, list) or not isinstance(feedforward, list):
        return fields
    whole = [each for each in feedforward if each.endswith(tuple(f".{end}" for end in targets))]
    return fields | {"target_modules": [*targets, *whole]}


@settings(max_examples=200)
@given(configs())
def test_a_config_adapts_what_peft_wraps_and_on_the_same_side(
    config: tuple[str, dict[str, Any]],
) -> None:
    family, fields = config
    assert our_sides(family, **fields) == sides_of_peft(family, **with_whole_names(fields))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("opt", {}),
        ("t5", {}),
        ("llama", {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}),
        ("gpt2", {"target_modules": "ALL-LINEAR", "feedforward_modules": r".*mlp\.c_fc"}),
        ("opt", {"target_modules": ["q_proj", "fc1", "lm_head"], "feedforward_modules": ["fc1"]}),
        ("t5", {"target_modules": r".*SelfAttention\.[kv]|.*wo", "feedforward_modules": []}),
        ("t5", {"target_modules": ["SelfAttention.q", "wo"], "feedforward_modules": ["wo"]}),
        ("llama", {"exclude_modules": ["layers.0.mlp.down_proj", "v_proj"]}),
        ("llama", {"exclude_modules": r".*\.1\..*"}),
        ("llama", {"modules_to_save": ["mlp", "lm_head"]}),
    ],
    ids=str,
)
def test_a_common_config_is_accepted_as_by_peft(family: str, fields: dict[str, Any]) -> None:
    assert our_sides(family, **fields)
    assert our_sides(family, **fields) == sides_of_peft(family, **fields)


def test_a_bare_end_of_a_name_makes_a_feedforward_module() -> None:
    """PEFT's quirk: targets match whole parts of a path, feed-forward modules any end of it."""
    fields = {"target_modules": ["down_proj", "n_proj"], "feedforward_modules": ["n_proj"]}
    sides = our_sides("llama", **fields)
    assert sides is not None
    assert set(sides.values()) == {"input"}
    assert sides == sides_of_peft("llama", **fields)


def test_modules_to_save_are_never_targets() -> None:
    sides = our_sides("llama", target_modules="all-linear", modules_to_save=["self_attn"])
    assert sides is not None
    assert not any("self_attn" in name for name in sides)


def test_our_defaults_are_those_of_peft() -> None:
    assert constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING == TARGET_MODULES
    assert constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING == FEEDFORWARD_MODULES


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", BASES)
def test_a_vector_is_as_long_as_peft_s(family: str) -> None:
    config = peft.IA3Config(target_modules="all-linear", feedforward_modules=".*(0|wo).*[kop].*")
    model = peft.IA3Model(copy.deepcopy(BASES[family]), config, "default")
    theirs = {
        name.removeprefix("model."): layer.ia3_l["default"].numel()
        for name, layer in model.named_modules()
        if isinstance(layer, IA3Layer)
    }
    ours = IA3Config(target_modules="all-linear", feedforward_modules=".*(0|wo).*[kop].*")
    targets = resolve_targets(ours, MODULES[family])
    assert {t.module: MODULES[family].size(t) for t in targets} == theirs
    assert len({t.side for t in targets}) == len(Side)


def test_a_model_type_without_defaults_needs_named_targets() -> None:
    unknown = replace(MODULES["llama"], model_type="newcomer")
    with pytest.raises(InvalidAdapter, match="no default for the model type 'newcomer'"):
        resolve_targets(IA3Config(), unknown)
    with pytest.raises(InvalidAdapter, match="feedforward_modules"):
        resolve_targets(IA3Config(target_modules=["k_proj"]), unknown)


def test_a_config_that_matches_nothing_is_told_what_there_is() -> None:
    [fault] = faults_of("llama", target_modules=["query"], feedforward_modules=[])
    assert "matches no module" in fault
    assert "down_proj, gate_proj, k_proj" in fault


def test_every_match_that_is_no_linear_layer_is_named() -> None:
    faults = faults_of("llama", target_modules=["mlp", "k_proj"], feedforward_modules=[])
    assert ["model.layers.0.mlp" in faults[0], "model.layers.1.mlp" in faults[1]] == [True, True]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "is no regular expression"),
        (".*[", "is no regular expression"),
        ("k_proj)", "is no regular expression"),
        ("(?V1)a", "is no regular expression"),
        ("(?R)", "is no regular expression"),
        ("((a{9999}){9999}){9999}", "more than 100 times"),
        ("((((a{10}){10}){10}){10}){10}", "more than 100 times"),
        ("a{2,99999999999}", "more than 100 times"),
        ("(?x)((a{9 9 9}){9 9 9}){9 9 9}", "no count"),
        ("(?:k_proj){e<=900}", "no count"),
        ("(" * 1000 + ")" * 1000, ""),
        ("a" * 2001, "longer than 2000"),
    ],
    ids=lambda value: value[:30],
)
def test_a_regular_expression_that_cannot_be_used_is_refused_with_its_field(
    field: str, pattern: str, problem: str
) -> None:
    fields = {"feedforward_modules": [], field: [pattern] if "save" in field else pattern}
    [fault] = faults_of("llama", **fields)
    assert field in fault
    assert problem in fault


@given(st.text(st.sampled_from("ak_0.*+?|()[]{},:=!<>^$\\\\xbPiaLR1 #\n-"), max_size=30))
def test_any_text_is_a_regular_expression_that_peft_can_use_or_is_refused(pattern: str) -> None:
    fields = {"target_modules": pattern, "feedforward_modules": [], "exclude_modules": pattern}
    assert our_sides("llama", **fields) is None


@pytest.mark.parametrize("field", FIELDS)
def test_a_regular_expression_without_end_is_stopped_and_lets_other_threads_run(
    field: str,
) -> None:
    hostile = r"(?:(.)|(.\1?))+[A-Z]"
    fields = {"feedforward_modules": [], field: [hostile] if "save" in field else hostile}
    ticks = []
    finished = threading.Event()

    def tick() -> None:
        while not finished.wait(0.01):
            ticks.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    ticking.start()
    try:
        started = time.monotonic()
        [fault] = faults_of("llama", **fields)
        took = time.monotonic() - started
    finally:
        finished.set()
        ticking.join()
    assert field in fault
    assert "takes more than 1 s" in fault
    assert took < 60  # Unbroken, it would take years.
    assert len(ticks) > 10
