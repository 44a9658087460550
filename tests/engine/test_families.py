"""Families whose attention goes through transformers' interface run on the flat engine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine import UnsupportedModel
from tests.engine.harness import Harness, Oracle
from tests.factories import save_adapter, tiny_model

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {},
}
TARGETS = {"qwen3": (["k_proj", "v_proj", "down_proj"], ["down_proj"])}
"""For families without a default in PEFT's table."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """Prompts beyond the sliding window, in chunks, the base beside an adapter."""
    base = tiny_model(family, **FAMILIES[family])
    targets, feedforward = TARGETS.get(family, (None, None))
    adapter = save_adapter(
        base, tmp_path / "a", target_modules=targets, feedforward_modules=feedforward
    )
    oracles = {None: Oracle(base), "a": Oracle(base, adapter)}
    engine = start(base, {"a": adapter}, prefill_chunk_tokens=9)
    asked = [
        (name, [5 + (7 * seed + n) % 250 for n in range(length)])
        for seed, length in enumerate((3, 12, 30))
        for name in (None, "a")
    ]
    with engine.held():
        for number, (name, prompt) in enumerate(asked):
            engine.submit(str(number), prompt, name, max_tokens=12)
    engine.wait()

    for number, (name, prompt) in enumerate(asked):
        assert engine.answers[str(number)].tokens == oracles[name].greedy(prompt, 12)


def test_a_family_that_attends_past_the_interface_is_refused(
    start: Callable[..., Harness],
) -> None:
    with pytest.raises(UnsupportedModel, match="Bloom"):
        start(tiny_model("bloom"), {})
