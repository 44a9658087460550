"""Every family in PEFT's IA3 table that generates text runs, flat or padded, as PEFT does."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from infuse.server.engine import UnsupportedModel
from tests.driver import log_probabilities
from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Harness
from tests.engine.models_page import PAGE, Seen, beginning
from tests.factories import TOKENS, save_adapter, tiny_model
from tests.families import FAMILIES, Family, tiny

TOKENS_OUT = 8
PADDED = {"llama4_text", "gpt_neo", "gptj", "bloom", "falcon", "falcon-alibi", "t5", "mt5", "bart"}
ROWS: list[tuple[str, ...]] = [(), ("first",), ("second",), ("regex",), ("first", "second")]
"""The base, two adapters with the default targets, one with a regex, and a product of two."""
PROMPTS = [
    [5 + (7 * seed + n) % 250 for n in range(length)] for seed, length in enumerate((3, 30, 12))
]
"""Longer than the sliding windows, and than a chunk."""


def save_adapters(family: Family, base: PreTrainedModel, folder: Path) -> dict[str, Path]:
    kinds = {"first": family.default_config, "second": family.default_config}
    kinds["regex"] = family.regex_config
    return {
        name: save_adapter(base, folder / name, seed=seed, **config)
        for seed, (name, config) in enumerate(kinds.items(), start=1)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_peft(
    start: Callable[..., Harness], request: pytest.FixtureRequest, tmp_path: Path, family: str
) -> None:
    """Row for row: greedy tokens are equal, and float32 logits err at most twice as much as PEFT's
    own do (against PEFT in float64)."""
    base = tiny(family)
    adapters = save_adapters(FAMILIES[family], base, tmp_path / "adapters")
    engine = start(base, adapters, prefill_chunk_tokens=9, max_rows=6)
    assert engine.engine.core.runner_kind == ("padded" if family in PADDED else "flat")
    with engine.held():
        for row, names in enumerate(ROWS):
            for number, prompt in enumerate(PROMPTS):
                engine.submit(
                    f"{row}-{number}", prompt, *names, max_tokens=TOKENS_OUT, logprobs=TOKENS
                )
    engine.wait()

    ours, pefts = [], []
    for row, names in enumerate(ROWS):
        folders = [adapters[name] for name in names]
        plain = FamilyOracle(tiny(family), folders)
        exact = FamilyOracle(tiny(family), folders, torch.float64)
        for number, prompt in enumerate(PROMPTS):
            answer = engine.answers[f"{row}-{number}"]
            by_peft = plain.logprobs(prompt, answer.tokens)
            assert answer.tokens == by_peft.argmax(-1).tolist(), (names, prompt)
            wanted = exact.logprobs(prompt, answer.tokens)
            ours.append((log_probabilities(answer, TOKENS) - wanted).abs().max().item())
            pefts.append((by_peft - wanted).abs().max().item())
    assert max(ours) <= 2 * max(pefts)
    seen = Seen(family, engine.engine.core.runner_kind, max(pefts), max(ours))
    request.node.user_properties.append(seen.as_property)
    engine.assert_idle()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_about_models_says_how_a_family_runs(family: str) -> None:
    """`make test-full` writes it."""
    assert beginning(family, "padded" if family in PADDED else "flat") in PAGE.read_text()


def test_a_model_that_fits_neither_runner_is_refused(start: Callable[..., Harness]) -> None:
    model = tiny_model("bloom")
    # Attention that looks at the whole batch.
    model.transformer.ln_f.register_forward_hook(lambda *args: args[2] + args[2].mean(dim=0))
    with pytest.raises(UnsupportedModel, match=r"Bloom.* alone"):
        start(model, {})
