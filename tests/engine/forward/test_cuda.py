"""The CUDA path: paged blocks, the varlen kernel, captured decode steps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.harness import Harness, Oracle
from tests.factories import TOKENS, save_adapter, tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = [[5 + (11 * row + n) % 250 for n in range(3 + 9 * row)] for row in range(8)]


def test_a_mixed_batch_equals_peft_in_float32(
    start: Callable[..., Harness], llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    """Blocks gathered, since the kernel knows half precision only."""
    names = [None, *adapters]
    engine = start(tiny_model("llama").cuda(), prefill_chunk_tokens=20)
    with engine.held():
        for row, prompt in enumerate(PROMPTS):
            engine.submit(str(row), prompt, names[row], max_tokens=20)
    engine.wait()

    for row, prompt in enumerate(PROMPTS):
        oracle = Oracle(llama, adapters.get(names[row] or ""))
        assert engine.answers[str(row)].tokens == oracle.greedy(prompt, 20)
    engine.assert_idle()


def test_new_columns_in_the_bank_make_captured_steps_new(
    start: Callable[..., Harness], llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    engine = start(tiny_model("llama").cuda())
    for name in (None, *adapters, None):
        oracle = Oracle(llama, adapters.get(name or ""))
        assert engine.ask([5, 6, 7], name, max_tokens=6).tokens == oracle.greedy([5, 6, 7], 6)


def test_bfloat16_through_the_kernel_is_as_near_to_float32_as_peft_is(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = tiny_model("llama", **shape)
    adapter = save_adapter(base, tmp_path / "a")
    prompt = PROMPTS[-1]
    exact = Oracle(base, adapter).logits(prompt)[-1].log_softmax(-1)
    half = Oracle(base.to(torch.bfloat16), adapter, torch.bfloat16)
    theirs = (half.logits(prompt)[-1].float().log_softmax(-1) - exact).abs().max().item()
    engine = start(base.cuda(), {"a": adapter})

    [scored] = engine.ask(prompt, "a", max_tokens=1, logprobs=TOKENS).logprobs
    tokens, values = zip(*scored.top, strict=True)
    ours = (torch.tensor(values) - exact[list(tokens)]).abs().max().item()
    assert ours <= 2 * theirs
