"""Slots: what a server fills, and what each row and segment of a packed batch then computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target
from infuse.adapters.model.bank import BASE_SLOT, AdapterBank, Segment
from infuse.adapters.model.layer import IA3Layer
from infuse.adapters.model.slots import IA3Slots, Version
from tests.adapters.kinds import KINDS, Known, packed_logits
from tests.factories import tiny_llama

CAPACITY = 4
MODULES = BaseModules.of(tiny_llama())


@pytest.fixture
def model() -> IA3Slots:
    model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
    model.bank.reserve_rows(8)
    return model


def test_rows_and_segments_of_one_step_each_have_their_slot(model: IA3Slots, known: Known) -> None:
    kinds = dict(enumerate(KINDS, start=1))
    for slot, kind in kinds.items():
        model.fill_slot(slot, known.vectors[kind])
    rows, segments = [2, 0, 1, 3, 1], [Segment(3, 4), Segment(0, 2), Segment(1, 6)]
    step = packed_logits(model, rows, segments)
    assert torch.allclose(step, known.step(kinds, rows, segments), atol=1e-5)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.integers(1, CAPACITY), st.sampled_from(sorted(KINDS))),
        st.tuples(st.just("clear"), st.integers(1, CAPACITY), st.none()),
        st.tuples(
            st.just("step"),
            st.lists(st.integers(0, CAPACITY), max_size=5),
            st.lists(st.tuples(st.integers(0, CAPACITY), st.integers(1, 6)), max_size=3),
        ),
    ),
    min_size=4,
    max_size=14,
)


@settings(max_examples=60)
@given(steps, st.sampled_from([None, 16]))
def test_whatever_came_before_a_step_computes_what_its_slots_hold(
    known: Known, steps: list[tuple[str, Any, Any]], panel_width: int | None
) -> None:
    model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
    if panel_width is not None:
        model.bank.use_panels(panel_width)
    model.bank.reserve_rows(5)
    kinds: dict[int, str] = {}
    for what, first, second in steps:
        if what == "fill":
            model.fill_slot(first, known.vectors[second])
            kinds[first] = second
        elif what == "clear":
            model.clear_slot(first)
            kinds.pop(first, None)
        else:
            # A slot that nothing fills is never in a step.
            rows = [slot for slot in first if slot in kinds or slot == BASE_SLOT]
            segments = [Segment(slot, n) for slot, n in second if slot in kinds or slot == 0]
            if rows or segments:
                step = packed_logits(model, rows, segments)
                assert torch.allclose(step, known.step(kinds, rows, segments), atol=1e-5)


@pytest.mark.parametrize("segments", [[], [Segment(BASE_SLOT, 6)]], ids=["decode", "prefill"])
def test_slot_0_is_the_plain_model_bit_for_bit(
    model: IA3Slots, known: Known, segments: list[Segment]
) -> None:
    plain = packed_logits(model, [0, 0, 0], segments)
    model.fill_slot(1, known.vectors["default"])
    model.fill_slot(2, known.vectors["mlp_out"])
    packed_logits(model, [1, 2, 1], [])
    assert torch.equal(packed_logits(model, [0, 0, 0], segments), plain)


def test_a_row_of_slot_0_beside_adapters_is_the_plain_model_bit_for_bit(
    model: IA3Slots, known: Known
) -> None:
    plain = packed_logits(model, [0, 0, 0], [])
    model.fill_slot(1, known.vectors["default"])
    model.fill_slot(2, known.vectors["queries"])
    assert torch.equal(packed_logits(model, [1, 0, 2], [])[1], plain[1])


def test_filling_a_slot_again_changes_the_rows_that_use_it(model: IA3Slots, known: Known) -> None:
    for kind in ("default", "mlp_out", "default", "queries"):
        model.fill_slot(1, known.vectors[kind])
        step = packed_logits(model, [1, 0, 1], [])
        expected = known.step({1: kind}, [1, 0, 1], [])
        assert torch.allclose(step, expected, atol=1e-5), kind


def test_a_cleared_slot_can_be_filled_by_an_adapter_of_other_modules(
    model: IA3Slots, known: Known
) -> None:
    model.fill_slot(1, known.vectors["default"])
    packed_logits(model, [1], [])
    model.clear_slot(1)
    model.fill_slot(1, known.vectors["queries"])
    step = packed_logits(model, [1], [])
    assert torch.allclose(step, known.step({1: "queries"}, [1], []), atol=1e-5)


def test_a_module_is_wrapped_once_and_only_when_an_adapter_needs_it(
    model: IA3Slots, known: Known
) -> None:
    def wrapped() -> set[str]:
        layers = model.base.named_modules()
        return {name.split(".")[-1] for name, layer in layers if isinstance(layer, IA3Layer)}

    assert wrapped() == set()
    model.fill_slot(1, known.vectors["queries"])
    assert wrapped() == {"q_proj"}
    model.fill_slot(2, known.vectors["default"])
    model.fill_slot(3, known.vectors["mlp_out"])
    assert wrapped() == {"q_proj", "k_proj", "v_proj", "down_proj"}
    assert not isinstance(
        model.base.get_submodule("model.layers.0.mlp.down_proj").base_layer, IA3Layer
    )


def test_the_version_says_what_must_be_made_again(model: IA3Slots, known: Known) -> None:
    def differs(change: Callable[[], object]) -> set[str]:
        before = model.version
        change()
        both = zip(Version._fields, before, model.version, strict=True)
        return {field for field, old, new in both if old != new}

    fill, packed = model.fill_slot, model.set_packed
    assert differs(lambda: fill(1, known.vectors["default"])) == {"layers", "columns"}
    assert differs(lambda: packed([1])) == {"scales"}
    assert differs(lambda: packed([1])) == set()
    assert differs(lambda: fill(2, known.vectors["default"])) == set()
    assert differs(lambda: fill(3, known.vectors["mlp_out"])) == {"columns"}
    assert differs(lambda: packed([1, 2])) == {"scales"}
    assert differs(model.unload) == {"layers", "scales", "columns"}


def test_a_column_is_made_for_each_module_and_side_in_use(model: IA3Slots, known: Known) -> None:
    assert (model.bank.column_count, model.bank.nbytes) == (0, 0)
    model.fill_slot(1, known.vectors["queries"])
    model.fill_slot(2, known.vectors["queries"])
    assert set(model.bank.columns) == set(known.vectors["queries"].vectors)
    model.fill_slot(3, known.vectors["default"])
    model.fill_slot(4, known.vectors["mlp_out"])
    both_sides = {t.side for t in model.bank.columns if t.module.endswith("down_proj")}
    assert both_sides == set(Side)
    assert model.bank.column_count == len({t for v in known.vectors.values() for t in v.vectors})


def test_the_bank_s_bytes_are_its_slots_and_its_rows(known: Known) -> None:
    bank = AdapterBank(MODULES, capacity=4, device=torch.device("cpu"))
    bank.reserve_rows(8)
    bank.fill(1, known.vectors["queries"])
    assert bank.nbytes == (4 + 1 + 8) * known.vectors["queries"].nbytes
    bank.fill(2, known.vectors["queries"])
    assert bank.nbytes == (4 + 1 + 8) * known.vectors["queries"].nbytes


@pytest.mark.parametrize("panel_width", [None, 16, 24])
def test_adapters_of_the_default_kind_take_the_bytes_that_were_planned(
    known: Known, panel_width: int | None
) -> None:
    bank = AdapterBank(MODULES, capacity=4, device=torch.device("cpu"))
    if panel_width is not None:
        bank.use_panels(panel_width)
    bank.reserve_rows(8)
    planned = bank.planned_nbytes()
    bank.fill(1, known.vectors["default"])
    assert bank.nbytes == planned


def test_rows_reserved_later_are_up_to_date(known: Known) -> None:
    model = IA3Slots(tiny_llama(), max_adapters=1)
    model.fill_slot(1, known.vectors["default"])
    packed_logits(model, [1], [])
    model.bank.reserve_rows(3)
    model.bank.reserve_rows(2)
    step = packed_logits(model, [1, 0, 1], [])
    assert torch.allclose(step, known.step({1: "default"}, [1, 0, 1], []), atol=1e-5)


def test_a_sheet_that_no_row_uses_is_passed_over_unless_kept_active(known: Known) -> None:
    bank = AdapterBank(MODULES, capacity=2, device=torch.device("cpu"))
    bank.reserve_rows(2)
    bank.fill(1, known.vectors["default"])
    bank.fill(2, known.vectors["queries"])
    assert bank.packed([0, 1], []).keys() == known.vectors["default"].vectors.keys()
    assert bank.packed([0, 0], []) == {}
    bank.keep_active = True
    kept = bank.packed([0, 0], [])
    assert kept.keys() == set(bank.columns)
    for target, scale in kept.items():
        x = torch.randn(1, 2, MODULES.size(target))
        assert torch.equal(scale.scaled(x), x)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, CAPACITY), min_size=1, max_size=2), min_size=2))
def test_more_slots_than_a_batch_has_rows_take_turns_in_its_panels(
    known: Known, batches: list[list[int]]
) -> None:
    model = IA3Slots(tiny_llama(), max_adapters=CAPACITY)
    model.bank.use_panels(8)
    model.bank.reserve_rows(2)
    kinds = dict(zip(range(1, CAPACITY + 1), sorted(KINDS), strict=False))
    for slot, kind in kinds.items():
        model.fill_slot(slot, known.vectors[kind])
    for slots in batches:
        rows = [slot for slot in slots if slot in kinds or slot == BASE_SLOT] or [BASE_SLOT]
        step = packed_logits(model, rows, [])
        assert torch.allclose(step, known.step(kinds, rows, []), atol=1e-5)


@pytest.mark.parametrize("panel_width", [1, 7, 16])
@pytest.mark.parametrize("segments", [[], [Segment(3, 4), Segment(0, 2), Segment(1, 3)]])
def test_a_vector_for_each_token_does_what_rows_and_segments_do(
    known: Known, segments: list[Segment], panel_width: int
) -> None:
    """What a GPU and our kernels use is compared with what the CPU uses without them."""
    bank, in_panels = (AdapterBank(MODULES, 3, torch.device("cpu")) for _ in range(2))
    in_panels.use_panels(panel_width)
    for each in (bank, in_panels):
        each.reserve_rows(2)
        for slot, kind in enumerate(KINDS, start=1):
            each.fill(slot, known.vectors[kind])
    rows = [1, 0]
    by_segment = bank.packed(rows, segments)
    for by_token in (bank.by_token(rows, segments), in_panels.packed(rows, segments)):
        assert by_segment.keys() == by_token.keys()
        assert not any(t.module.endswith("q_proj") for t in by_token)
        for target, scale in by_segment.items():
            x = torch.randn(1, 2 + sum(s.tokens for s in segments), MODULES.size(target))
            assert torch.equal(scale.scaled(x), by_token[target].scaled(x))


@pytest.mark.parametrize("slot", [BASE_SLOT, -1, 3])
def test_a_slot_outside_of_the_bank_is_a_bug(slot: int) -> None:
    bank = AdapterBank(MODULES, capacity=2, device=torch.device("cpu"))
    vectors = AdapterVectors({Target("lm_head", Side.INPUT): torch.ones(32)})
    with pytest.raises(AssertionError, match="of 2"):
        bank.fill(slot, vectors)


def test_more_rows_than_reserved_are_a_bug(known: Known) -> None:
    bank, in_panels = (AdapterBank(MODULES, 2, torch.device("cpu")) for _ in range(2))
    in_panels.use_panels(16)
    for each in (bank, in_panels):
        each.fill(1, known.vectors["default"])
        each.fill(2, known.vectors["default"])
        with pytest.raises(AssertionError, match="reserve_rows"):
            each.packed([1, 2], [])


def test_a_slot_that_cannot_be_filled_keeps_what_it_had(known: Known) -> None:
    model = IA3Slots(tiny_llama(), max_adapters=1)
    model.fill_slot(1, known.vectors["default"])
    before = packed_logits(model, [], [Segment(1, 6)])
    broken = AdapterVectors(
        known.vectors["queries"].vectors, {"lm_head": {"no.such": torch.ones(1)}}
    )
    with pytest.raises(AttributeError):
        model.fill_slot(1, broken)
    assert torch.equal(packed_logits(model, [], [Segment(1, 6)]), before)
