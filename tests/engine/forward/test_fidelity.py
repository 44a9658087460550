"""No model is served by a runner whose logits are not the plain model's."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, PreTrainedModel

from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine import UnsupportedModel
from infuse.server.engine.native.attention import IMPLEMENTATION, LayerAttention, install
from infuse.server.engine.native.cache.strip_attention import StripPlan
from infuse.server.engine.native.forward.padded_runner import PaddedRunner
from infuse.server.engine.native.forward.runner import FlatRunner, Logits
from infuse.server.engine.native.sequences.step import Step
from tests.engine.harness import Harness, Oracle
from tests.factories import tiny_model
from tests.hybrid_families import tiny_hybrid

LONGCAT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 8,
    "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 32,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "num_layers": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
}
WRONG_BEFORE: dict[str, dict[str, Any]] = {
    "diffllama": {},
    "longcat_flash": LONGCAT | {"zero_expert_num": 0},
    "longcat_flash-zero": LONGCAT | {"zero_expert_num": 1},
    "phimoe": {"sliding_window": 8, "num_local_experts": 4},
    "qwen2_moe": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}
"""Families that were answered wrongly in silence."""


@pytest.mark.parametrize("family", WRONG_BEFORE)
def test_a_family_that_was_answered_wrongly_is_exact(
    start: Callable[..., Harness], family: str
) -> None:
    def model() -> PreTrainedModel:
        return tiny_model(family.partition("-")[0], **WRONG_BEFORE[family])

    engine = start(model(), {})
    plain = model()
    plain.set_experts_implementation("eager")
    prompt = [5 + 7 * n % 250 for n in range(20)]

    assert engine.ask(prompt, max_tokens=6).tokens == Oracle(plain).greedy(prompt, 6)


def test_a_wrong_flat_runner_is_caught_and_the_padded_one_serves(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = FlatRunner.run

    def wrong(self: FlatRunner, step: Step) -> Logits:
        """The rows' logits in another order, which shows only where there are several."""
        logits = right(self, step)
        return Logits(logits.sequences, logits.next_token.flip(0), logits.prompts, logits.drafts)

    monkeypatch.setattr(FlatRunner, "run", wrong)
    with caplog.at_level(logging.INFO):
        engine = start(tiny_model("llama"), {})

    assert engine.engine.core.runner_kind == "padded"
    assert "differ from the plain model's" in caplog.text


def test_a_model_that_both_runners_compute_wrongly_is_refused_with_what_differs(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    for runner in (FlatRunner, PaddedRunner):

        def wrong(self: Any, step: Step, right: Any = runner.run) -> Logits:
            """Decode steps only are wrong, and only a little."""
            logits = right(self, step)
            if step.decode and not step.prefill:
                logits.next_token.mul_(1.01)
            return logits

        monkeypatch.setattr(runner, "run", wrong)

    with pytest.raises(UnsupportedModel, match=r"padded.* differ .*; and .* flat.* differ "):
        start(tiny_model("llama"), {})


def test_a_runner_that_forgets_the_adapter_is_caught(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("set_packed", "set_rows"):
        monkeypatch.setattr(IA3Slots, name, lambda *_: None)

    with pytest.raises(UnsupportedModel, match="of an adapter differ"):
        start(tiny_model("llama"), {})


def test_attention_that_ignores_a_window_is_caught(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StripPlan.attend

    def wrong(self: StripPlan, q: Any, k: Any, v: Any, layer: LayerAttention) -> torch.Tensor:
        return right(self, q, k, v, LayerAttention(layer.layer, layer.scaling))

    monkeypatch.setattr(StripPlan, "attend", wrong)

    engine = start(tiny_model("mistral", sliding_window=24), {})

    assert engine.engine.core.runner_kind == "padded"


def test_an_argument_of_attention_that_is_not_known_is_refused() -> None:
    install(tiny_model("llama"))
    attention = AttentionInterface()[IMPLEMENTATION]
    states = torch.zeros(1, 1, 1, 8)
    for name in ("sinks", "position_bias", "indices", "logits_soft_cap"):
        with pytest.raises(UnsupportedModel, match=name):
            attention(torch.nn.Identity(), states, states, states, None, **{name: states})


def test_the_bank_is_as_new_after_the_comparison(start: Callable[..., Harness]) -> None:
    engine = start(tiny_model("llama"), {})

    assert engine.ia3.bank.column_count == 0
    assert engine.engine.stats().kv_tokens_used == 0


def test_the_reason_of_a_refusal_names_both_runners(start: Callable[..., Harness]) -> None:
    model = tiny_model("bloom")
    # Attention that looks at the whole batch.
    model.transformer.ln_f.register_forward_hook(lambda *args: args[2] + args[2].mean(dim=0))

    with pytest.raises(UnsupportedModel, match=r"Bloom.* padded.*flat"):
        start(model, {}, max_model_len=64)


def test_what_one_start_has_compared_the_next_one_does_not(
    start: Callable[..., Harness], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for text in ("modules equals", "earlier start"):
        caplog.clear()
        engine = start(tiny_model("llama"), {}, trace_cache=tmp_path)
        assert text in caplog.text
        assert engine.ask([5, 6, 7]).tokens
    [kept] = tmp_path.glob("compared-*.json")

    for damage in ("", "{}", '{"equal": ["as'):
        kept.write_text(damage)
        caplog.clear()
        start(tiny_model("llama"), {}, trace_cache=tmp_path)
        assert "modules equals" in caplog.text


def test_what_was_compared_is_known_of_models_of_that_kind_only(
    start: Callable[..., Harness], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    start(tiny_model("llama"), {}, trace_cache=tmp_path)
    for model, settings in (
        (tiny_model("qwen2"), {}),
        (tiny_model("llama"), {"max_model_len": 50}),
        (tiny_model("llama"), {"pack_linears": False}),
    ):
        caplog.clear()
        start(model, {}, trace_cache=tmp_path, **settings)
        assert "earlier start" not in caplog.text


def test_what_a_padded_model_reads_of_packed_layers_is_known_too(
    start: Callable[..., Harness], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        model = tiny_hybrid("jamba")
        answers.append(start(model, {}, trace_cache=tmp_path).ask([5, 6, 7]).tokens)

    assert "earlier start" in caplog.text
    assert answers[0] == answers[1]
