"""Adapters that bring whole modules (`modules_to_save`) beside others, in one batch: as PEFT."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.harness import Harness, Oracle
from tests.factories import TOKENS, save_adapter, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

SAVED: dict[str, dict[str, Any]] = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embed_tokens"]},
    "final norm": {"modules_to_save": ["model.norm"]},
    "norms": {"modules_to_save": ["norm"]},
    "both ends": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "mlp": {"modules_to_save": ["mlp"], "target_modules": ["k_proj"], "feedforward_modules": []},
    "one linear": {
        "modules_to_save": ["layers.1.mlp.down_proj", "layers.0.self_attn.q_proj"],
        "target_modules": ["v_proj"],
        "feedforward_modules": [],
    },
    "vectors": {},
    "vector on the head": {"target_modules": ["lm_head"], "feedforward_modules": ["lm_head"]},
    "vectors in the mlp": {
        "target_modules": ["up_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}
"""Saved modules of every kind, and plain adapters that rescale the very same modules."""


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def saved(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {
        name.replace(" ", "-"): save_adapter(base, root / name.replace(" ", "-"), seed=n, **config)
        for n, (name, config) in enumerate(SAVED.items(), start=1)
    }


def fresh(base: PreTrainedModel) -> PreTrainedModel:
    return tiny_model("llama", tie_word_embeddings=base.config.tie_word_embeddings)


def requests(saved: Mapping[str, Path], count: int) -> list[tuple[str | None, list[int]]]:
    rng = random.Random(3)
    names = [None, *saved]
    return [
        (names[n % len(names)], [rng.randrange(5, TOKENS) for _ in range(rng.randint(1, 30))])
        for n in range(count)
    ]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="packed"),
        pytest.param({"prefill_chunk_tokens": 7}, id="prompts in small chunks"),
        pytest.param({"max_resident": 2, "max_rows": 6}, id="fewer slots than adapters"),
    ],
)
def test_mixed_rows_equal_peft(
    start: Callable[..., Harness],
    base: PreTrainedModel,
    saved: dict[str, Path],
    config: dict[str, Any],
) -> None:
    asked = requests(saved, 22)
    oracles = {name: Oracle(base, saved.get(name or "")) for name in [None, *saved]}
    engine = start(fresh(base), saved, **config)
    with engine.held():
        for number, (adapter, prompt) in enumerate(asked):
            engine.submit(str(number), prompt, adapter, max_tokens=8)
    engine.wait()

    for number, (adapter, prompt) in enumerate(asked):
        expected = oracles[adapter].greedy(prompt, 8)
        assert engine.answers[str(number)].tokens == expected, f"row {number} on {adapter}"
    engine.assert_idle()


def test_float32_logits_err_at_most_twice_as_much_as_pefts_do(
    start: Callable[..., Harness], base: PreTrainedModel, saved: dict[str, Path]
) -> None:
    engine = start(fresh(base), saved)
    asked = requests(saved, 11)
    with engine.held():
        for adapter, prompt in asked:
            engine.submit(str(adapter), prompt, adapter, max_tokens=1, prompt_logprobs=TOKENS)
    engine.wait()

    ours, pefts = [], []
    for adapter, prompt in asked:
        exact = Oracle(base, saved.get(adapter or ""), torch.float64).logits(prompt)
        exact = exact.log_softmax(-1)
        for peft in Oracle(base, saved.get(adapter or "")).in_several_shapes(prompt):
            pefts.append((peft.log_softmax(-1) - exact).abs().max().item())
        for position, scored in enumerate((engine.answers[str(adapter)].prompt_logprobs or ())[1:]):
            assert scored is not None
            tokens, values = zip(*scored.top, strict=True)
            mine = torch.tensor(values, dtype=torch.float64)
            ours.append((mine - exact[position, list(tokens)]).abs().max().item())
    assert max(ours) <= 2 * max(pefts)


def scores_of_base_rows(engine: Harness, beside: list[str | None]) -> list[Any]:
    """Every logit (as a log-probability) of the base's rows, which alternate with these."""
    asked = [prompt for _, prompt in requests({}, 2 * len(beside))]
    with engine.held():
        for number, prompt in enumerate(asked):
            adapter = beside[number // 2] if number % 2 else None
            engine.submit(str(number), prompt, adapter, max_tokens=6, logprobs=TOKENS)
    engine.wait()
    return [engine.answers[str(number)].logprobs for number in range(0, len(asked), 2)]


def test_the_base_beside_saved_modules_equals_the_model_without_wrappers_bit_for_bit(
    start: Callable[..., Harness], base: PreTrainedModel, saved: dict[str, Path]
) -> None:
    plain = scores_of_base_rows(start(fresh(base), saved), [None] * 4)
    beside: list[str | None] = ["both-ends", "norms", "mlp", "head"]

    assert scores_of_base_rows(start(fresh(base), saved), beside) == plain


def test_a_bfloat16_base_keeps_saved_modules_in_bfloat16(
    start: Callable[..., Harness], base: PreTrainedModel, saved: dict[str, Path]
) -> None:
    engine = start(fresh(base).to(torch.bfloat16), saved)
    oracle = Oracle(fresh(base).to(torch.bfloat16), saved["both-ends"], torch.bfloat16)
    prompt = requests({}, 3)[2][1]

    scored = engine.ask(prompt, "both-ends", max_tokens=1, logprobs=TOKENS).logprobs[0]

    exact = oracle.logits(prompt)[-1].float().log_softmax(-1)
    tokens, values = zip(*scored.top, strict=True)
    assert torch.allclose(torch.tensor(values), exact[list(tokens)], atol=0.1)


def test_a_larger_vocabulary_runs_beside_the_base_and_neither_reads_the_others(
    start: Callable[..., Harness], base: PreTrainedModel, saved: dict[str, Path], tmp_path: Path
) -> None:
    larger = fresh(base)
    larger.resize_token_embeddings(TOKENS + 3, mean_resizing=False)
    both = save_adapter(larger, tmp_path / "both", modules_to_save=["embed_tokens", "lm_head"])
    prompts = [prompt for _, prompt in requests({}, 4)]
    new = [[TOKENS + n % 3, *prompt, TOKENS + 1] for n, prompt in enumerate(prompts)]
    bias = {TOKENS + 2: 1000.0}
    engine = start(fresh(base), {**saved, "larger": both})
    with engine.held():
        for n, (old, more) in enumerate(zip(prompts, new, strict=True)):
            engine.submit(f"base {n}", old)
            engine.submit(f"head {n}", old, "head")
            engine.submit(f"larger {n}", more, "larger")
        engine.submit("biased", new[0], "larger", logit_bias=bias)
        engine.submit("penalised", prompts[0], presence_penalty=1e-9, temperature=0.0)
    engine.wait()

    oracles = {"base": Oracle(base), "head": Oracle(base, saved["head"])}
    for n, (old, more) in enumerate(zip(prompts, new, strict=True)):
        for name, oracle in oracles.items():
            assert engine.answers[f"{name} {n}"].tokens == oracle.greedy(old, 8)
        assert engine.answers[f"larger {n}"].tokens == Oracle(larger, both).greedy(more, 8)
    assert engine.answers["biased"].tokens == [TOKENS + 2] * 8
    assert engine.answers["penalised"].tokens == engine.answers["base 0"].tokens
    engine.assert_idle()


def test_a_request_waits_until_its_modules_fit_beside_those_that_run(
    start: Callable[..., Harness], base: PreTrainedModel, saved: dict[str, Path]
) -> None:
    """There is room for one LM head at a time."""
    both = {"head": saved["head"], "both-ends": saved["both-ends"], "vectors": saved["vectors"]}
    room = 2 * TOKENS * 32 * 4
    engine = start(fresh(base), both, max_saved_bytes=room)
    asked = requests(both, 12)
    with engine.held():
        for number, (adapter, prompt) in enumerate(asked):
            engine.submit(str(number), prompt, adapter)
    engine.wait()

    for number, (adapter, prompt) in enumerate(asked):
        expected = Oracle(base, both.get(adapter or "")).greedy(prompt, 8)
        assert engine.answers[str(number)].tokens == expected
    assert 0 < engine.registry.stats().saved_bytes <= room
    engine.assert_idle()
