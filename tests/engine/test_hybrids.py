"""Families that carry a state from token to token answer as PEFT does, whatever the batch does."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from infuse.server.engine import FinishReason, UnsupportedModel
from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from infuse.server.engine.native.cache.padded_layers import LayerStates
from infuse.server.engine.native.cache.planning import Limits, cache_tokens
from tests.driver import log_probabilities
from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Harness
from tests.factories import TOKENS, save_adapter
from tests.hybrid_families import HYBRIDS, tiny_hybrid

ROWS: list[tuple[str, ...]] = [(), ("first",), ("second",), ("first", "second")]
"""The base, two adapters, and their product."""
PROMPTS = [
    [5 + (7 * seed + n) % 250 for n in range(length)] for seed, length in enumerate((1, 30, 12, 3))
]
"""Longer than the sliding windows, than a scan's blocks, and than a prefill chunk."""
FEW = ["qwen3_next", "lfm2", "falcon_h1", "jamba", "zamba2", "mamba2", "minimax"]
"""A delta rule; a convolution alone; both beside attention; a scan that does not go on from a
state; time steps with limits; no attention at all; a cache of its own."""
CPU = torch.device("cpu")
WINDOW = {"max_model_len": 256}
"""Models without attention name none."""


def save_adapters(family: str, folder: Path) -> dict[str, Path]:
    base, known = tiny_hybrid(family), HYBRIDS[family]
    return {
        "first": save_adapter(base, folder / "first", seed=1, **known.default_config),
        "second": save_adapter(base, folder / "second", seed=2, **known.regex_config),
    }


@pytest.fixture(params=FEW)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=[] if each in FEW else [pytest.mark.full]) for each in HYBRIDS],
)
def test_a_mixed_batch_equals_peft(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """Row for row, prompts in chunks: greedy tokens are equal, and float32 logits err at most twice
    as much as PEFT's own do (against PEFT in float64)."""
    adapters = save_adapters(family, tmp_path)
    engine = start(tiny_hybrid(family), adapters, prefill_chunk_tokens=9, max_rows=6, **WINDOW)
    assert engine.engine.core.runner_kind == "padded"
    with engine.held():
        for row, names in enumerate(ROWS):
            for number, prompt in enumerate(PROMPTS):
                engine.submit(f"{row}-{number}", prompt, *names, max_tokens=8, logprobs=TOKENS)
    engine.wait()

    ours, pefts = [], []
    for row, names in enumerate(ROWS):
        folders = [adapters[name] for name in names]
        plain = FamilyOracle(tiny_hybrid(family), folders)
        exact = FamilyOracle(tiny_hybrid(family), folders, torch.float64)
        for number, prompt in enumerate(PROMPTS):
            answer = engine.answers[f"{row}-{number}"]
            by_peft = plain.logprobs(prompt, answer.tokens)
            assert answer.tokens == by_peft.argmax(-1).tolist(), (names, prompt)
            wanted = exact.logprobs(prompt, answer.tokens)
            ours.append((log_probabilities(answer, TOKENS) - wanted).abs().max().item())
            pefts.append((by_peft - wanted).abs().max().item())
    assert max(ours) <= 2 * max(pefts), (max(ours), max(pefts))
    engine.assert_idle()


def test_rows_that_outgrow_the_cache_or_are_cancelled_leave_the_others_as_they_are(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """Answers of 70 tokens, where 8 rows of 64 fit."""
    folder = save_adapters(family, tmp_path)["first"]
    engine = start(
        tiny_hybrid(family), {"a": folder}, kv_cache_tokens=512, max_model_len=130, max_rows=8
    )
    asked = {str(number): [5 + number] for number in range(7)}
    with engine.held():
        for name, prompt in asked.items():
            engine.submit(name, prompt, "a", max_tokens=70)
        engine.submit("gone", [99], "a", max_tokens=70)
    while len(engine.answers["gone"].tokens) < 10:
        engine.read()
    engine.engine.cancel("gone")
    engine.wait()

    assert engine.answers["gone"].finish is FinishReason.CANCELLED
    assert engine.engine.stats().preemptions > 0
    FamilyOracle(tiny_hybrid(family), [folder]).assert_answered(engine, asked)
    engine.assert_idle()


def test_choices_of_one_prompt_compute_it_each_and_answer_the_same(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """A state cannot be cut at a token, so that nothing is shared, not even within an order."""
    folder = save_adapters(family, tmp_path)["first"]
    engine = start(tiny_hybrid(family), {"a": folder}, **WINDOW)
    prompt = [5 + 7 * n % 250 for n in range(70)]
    ids = engine.order("order", [prompt] * 3, "a")
    engine.wait()
    assert engine.engine.stats().prompt_tokens == 3 * len(prompt)
    again = engine.ask(prompt, "a")

    oracle = FamilyOracle(tiny_hybrid(family), [folder])
    oracle.assert_answered(engine, dict.fromkeys(ids, prompt))
    assert again.tokens == engine.answers[ids[0]].tokens
    engine.assert_idle()


def test_a_prompt_is_scored_as_peft_scores_it(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    folder = save_adapters(family, tmp_path)["first"]
    engine = start(tiny_hybrid(family), {"a": folder}, prefill_chunk_tokens=9, **WINDOW)
    prompt = [5 + 3 * n for n in range(30)]

    scored = engine.ask(prompt, "a", max_tokens=0, prompt_logprobs=0).prompt_logprobs

    FamilyOracle(tiny_hybrid(family), [folder]).assert_scored(prompt, scored)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("rwkv", "in a form of its own"),
        ("recurrent_gemma", "in a form of its own"),
        ("xlstm", "in a form of its own"),
        ("qwen4_exp_text", "DynamicIndexedLayer"),
    ],
)
def test_a_family_whose_state_cannot_be_taken_apart_by_rows_is_refused(
    start: Callable[..., Harness], family: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        start(tiny_hybrid(family), {}, **WINDOW)


def test_the_states_of_all_rows_count_as_memory() -> None:
    shapes = [LayerShape(2, 8, 8, torch.float32), LayerShape(0, 0, 0, torch.float32)]
    carried = [LayerStates(0, 0), LayerStates(1, 1000)]
    cache = PaddedCache(shapes, CPU, total_tokens=512, max_tokens=256, carried=carried, max_rows=4)

    assert cache.nbytes == 512 * 2 * 16 * 4 + 2 * 4 * 1000
    with pytest.raises(DoesNotFit, match="set --max-batch-rows lower"):
        cache_tokens(shapes, CPU, Limits(max_rows=4, max_tokens=256), asked=512, states=1 << 60)


def test_a_row_takes_its_state_into_another_group_and_a_failed_forward_leaves_it() -> None:
    shapes, carried = [LayerShape(0, 0, 0, torch.float32)], [LayerStates(1, 1000)]
    cache = PaddedCache(shapes, CPU, total_tokens=512, max_tokens=256, carried=carried, max_rows=4)
    for row in (0, 1):
        with cache.gather([row], [0], 3).advancing([3]) as taken:
            taken.update_conv_state(torch.full((1, 2, 3), 1.0 + row), 0, conv_kernel_size=4)
            taken.update_recurrent_state(torch.full((1, 5), 10.0 + row), 0)

    group = cache.gather([1, 0], [3, 3], 1)
    with suppress(RuntimeError), group.advancing([1, 1]) as taken:
        taken.get_recurrent_state(0).zero_()
        taken.get_conv_state(0).zero_()
        raise RuntimeError("halfway")

    conv, recurrent = group.states[0]
    assert conv is not None
    assert recurrent is not None
    assert conv[:, 0].tolist() == [[0, 2, 2, 2], [0, 1, 1, 1]]
    assert recurrent[:, 0].tolist() == [11, 10]
