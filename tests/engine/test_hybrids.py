"""Families that carry a state from token to token answer as PEFT does, whatever the batch does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Harness
from tests.engine.test_families import table
from tests.factories import TOKENS, save_adapter
from tests.hybrid_families import HYBRIDS, tiny_hybrid

ROWS: list[tuple[str, ...]] = [(), ("first",), ("second",), ("first", "second")]
"""The base, two adapters, and their product."""
PROMPTS = [
    [5 + (7 * seed + n) % 250 for n in range(length)] for seed, length in enumerate((1, 30, 12, 3))
]
"""Longer than the sliding windows, than a scan's blocks, and than a prefill chunk."""
FEW = ["qwen3_next", "lfm2", "falcon_h1", "jamba", "mamba2", "minimax"]
"""A delta rule; a convolution alone; both beside attention; a scan that does not go on; no attention
at all; a cache of its own."""


def save_adapters(family: str, folder: Path) -> dict[str, Path]:
    base, known = tiny_hybrid(family), HYBRIDS[family]
    return {
        "first": save_adapter(base, folder / "first", seed=1, **known.default_config),
        "second": save_adapter(base, folder / "second", seed=2, **known.regex_config),
    }


def greedy_of_peft(family: str, folders: list[Path], prompt: list[int], answer: list[int]) -> None:
    wanted = FamilyOracle(tiny_hybrid(family), folders).logprobs(prompt, answer)
    assert answer == wanted.argmax(-1).tolist(), prompt


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_mixed_batch_equals_peft(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """Row for row, prompts in chunks: greedy tokens are equal, and float32 logits err at most twice
    as much as PEFT's own do (against PEFT in float64)."""
    adapters = save_adapters(family, tmp_path)
    engine = start(tiny_hybrid(family), adapters, prefill_chunk_tokens=9, max_rows=6, **WINDOW)
    assert engine.engine.runner_kind == "padded"
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
            ours.append((table(answer.logprobs) - wanted).abs().max().item())
            pefts.append((by_peft - wanted).abs().max().item())
    assert max(ours) <= 2 * max(pefts), (max(ours), max(pefts))
    engine.assert_idle()


WINDOW = {"max_model_len": 256}
"""Models without attention name none."""
