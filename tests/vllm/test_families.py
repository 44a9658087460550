"""Every family answers a mixed batch as PEFT does: compiled, with prefix cache and chunked prefill.

Greedy tokens equal PEFT's wherever its two best are further apart than float noise.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from infuse.adapters.registry import Part
from infuse.adapters.residency import Lease
from infuse.server.engine import FinishReason
from tests.driver import Answer, log_probabilities
from tests.engine.family_oracle import FamilyOracle
from tests.factories import TOKENS
from tests.vllm.families import SHAPES, STRENGTH, save_kinds, weakened, wide
from tests.vllm.harness import BLOCK, CHUNK, VllmHarness
from tests.vllm.models_page import PAGE, Seen, beginning

TOKENS_OUT = 8
NOISE = 2e-4
"""Log-probabilities that float32 cannot tell apart."""
PROMPTS = [
    [5 + (7 * seed + 3 * n) % 250 for n in range(length)]
    for seed, length in enumerate((3, BLOCK + 8, 2 * CHUNK + 20))
]
"""Shorter than a block of the prefix cache, longer than one, and longer than a chunk."""


class Rows:
    """The rows of a batch: the base, each adapter, a product of two, and one at half strength."""

    def __init__(self, adapters: dict[str, Path], folder: Path) -> None:
        self.folders: dict[str, list[Path]] = {"base": []}
        self.folders |= {name: [adapter] for name, adapter in adapters.items()}
        self.folders["product"] = [adapters["default"], adapters["second"]]
        self.folders["strength"] = [weakened(adapters["regex"], folder / "weakened")]

    def lease(self, engine: VllmHarness, row: str) -> str | Lease | None:
        match row:
            case "base":
                return None
            case "product":
                return engine.registry.lease_mixture([Part("default"), Part("second")], "product")
            case "strength":
                return engine.registry.lease_mixture([Part("regex", STRENGTH)], "product")
        return row

    def ask_all(self, engine: VllmHarness) -> dict[str, list[Answer]]:
        """Ask all rows for all prompts at once."""
        with engine.held():
            for row in self.folders:
                for number, prompt in enumerate(PROMPTS):
                    engine.submit(
                        f"{row}-{number}",
                        prompt,
                        self.lease(engine, row),
                        max_tokens=TOKENS_OUT,
                        logprobs=TOKENS,
                    )
        engine.wait()
        return {
            row: [engine.answers[f"{row}-{n}"] for n in range(len(PROMPTS))] for row in self.folders
        }


def assert_batches_equal_peft(
    engine: VllmHarness, base: PreTrainedModel, adapters: dict[str, Path], folder: Path
) -> tuple[float, float]:
    """All rows at once, and once more with the prompts cached. Returns the largest difference of a
    log-probability to PEFT in float64: PEFT's own in float32, and ours."""
    rows = Rows(adapters, folder)
    computed = rows.ask_all(engine)
    hits = engine.engine.stats().prefix_hit_tokens
    cached = rows.ask_all(engine)
    assert engine.engine.stats().prefix_hit_tokens > hits
    pefts, ours = [], []
    for row, folders in rows.folders.items():
        plain = FamilyOracle(base, folders)
        exact = FamilyOracle(base, folders, torch.float64)
        for number, prompt in enumerate(PROMPTS):
            for answer in (computed[row][number], cached[row][number]):
                assert answer.finish is FinishReason.LENGTH, answer.error
                wanted = exact.logprobs(prompt, answer.tokens)
                chosen = wanted[range(TOKENS_OUT), answer.tokens]
                assert (wanted.max(-1).values - chosen).max() < NOISE, (row, number)
                ours.append((log_probabilities(answer, TOKENS) - wanted).abs().max().item())
            by_peft = plain.logprobs(prompt, answer.tokens)
            pefts.append((by_peft - wanted).abs().max().item())
    return max(pefts), max(ours)


def test_a_mixed_batch_equals_peft(
    engine: VllmHarness, llama: PreTrainedModel, adapters: dict[str, Path], tmp_path: Path
) -> None:
    _, error = assert_batches_equal_peft(engine, llama, adapters, tmp_path)

    assert error < NOISE
    assert engine.engine.stats().compiled


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", SHAPES)
def test_a_mixed_batch_of_every_family_equals_peft(
    start: Callable[..., VllmHarness],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    family: str,
) -> None:
    base = wide(family)
    adapters = save_kinds(family, base, tmp_path / "adapters")
    engine = start(base, adapters, targets=SHAPES[family].targets)
    assert engine.engine.stats().compiled
    peft_error, our_error = assert_batches_equal_peft(engine, base, adapters, tmp_path)

    assert our_error < NOISE
    request.node.user_properties.append(Seen(family, peft_error, our_error).as_property)
    engine.assert_idle()


@pytest.mark.parametrize("family", SHAPES)
def test_the_page_about_models_has_every_family(family: str) -> None:
    """The tests of this file write it with `--full`."""
    assert beginning(family) in PAGE.read_text()
