"""What every engine is given: the same prompts, the same adapters, the same number of tokens."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ["k_proj", "v_proj", "down_proj"]
"""PEFT's default for llama: keys and values on the output side, the feed-forward on the input."""
FEEDFORWARD = ["down_proj"]


@dataclass(frozen=True, slots=True)
class Workload:
    prompts: list[list[int]]
    """Token ids."""
    adapters: list[str]
    """Names; row i uses adapter i."""
    adapters_folder: Path
    tokens_out: int


def make_workload(
    model: Path, folder: Path, rows: int, tokens_in: int, tokens_out: int
) -> Workload:
    """Random prompts of ordinary tokens; one adapter for each row, its vectors near 1."""
    rng = random.Random(0)
    special = set(AutoTokenizer.from_pretrained(model).all_special_ids)
    base = AutoModelForCausalLM.from_pretrained(model)
    ordinary = [token for token in range(base.config.vocab_size) if token not in special]
    prompts = [rng.choices(ordinary, k=tokens_in) for _ in range(rows)]
    names = [f"adapter-{row:03}" for row in range(rows)]
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=FEEDFORWARD
    )
    tuned = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        for key, parameter in tuned.named_parameters():
            if "ia3_l" in key:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 1.0 + 0.05 * noise
        tuned.save_pretrained(folder / name)
    return Workload(prompts, names, folder, tokens_out)
