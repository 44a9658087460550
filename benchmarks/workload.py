"""What every engine is asked: the same prompts, the same adapters, the same number of tokens."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE

TARGETS = ["k_proj", "v_proj", "down_proj"]
"""PEFT's default for llama: keys and values on the output side, the feed-forward on the input.
LoRA adapts the same modules."""
FEEDFORWARD = ["down_proj"]
LORA_RANK = 8
ZIPF = 1.5
"""The exponent of Punica's skewed workload (Chen et al. 2024, §7)."""

Popularity = Literal["identical", "uniform", "zipf", "distinct"]


def random_prompts(model: Path, count: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """Ordinary tokens, drawn evenly. No two prompts begin alike."""
    rng = random.Random(seed)
    special = set(AutoTokenizer.from_pretrained(model).all_special_ids)
    vocabulary = AutoConfig.from_pretrained(model).vocab_size
    ordinary = [token for token in range(vocabulary) if token not in special]
    return [rng.choices(ordinary, k=tokens) for _ in range(count)]


def choose(
    popularity: Popularity, names: Sequence[str], count: int, seed: int = 0, exponent: float = ZIPF
) -> list[str]:
    """Which adapter each of `count` requests uses, after Punica's four workloads.

    identical: all the same; uniform: the root of `count` adapters, evenly; zipf: drawn, the n-th
    most popular in proportion to `n ** -exponent`; distinct: each another, as far as they go round.
    """
    match popularity:
        case "identical":
            return [names[0]] * count
        case "uniform":
            few = math.ceil(math.sqrt(count))
            return [names[number % few] for number in range(count)]
        case "zipf":
            weights = [rank**-exponent for rank in range(1, len(names) + 1)]
            return random.Random(seed).choices(names, weights, k=count)
        case "distinct":
            return [names[number % len(names)] for number in range(count)]


class Template:
    """Makes IA3 adapters of the shape of one that PEFT has saved, with vectors of their own near 1.

    An adapter costs no model this way.
    """

    def __init__(self, model: Path, scratch: Path) -> None:
        config = IA3Config(
            task_type="CAUSAL_LM", target_modules=TARGETS, feedforward_modules=FEEDFORWARD
        )
        folder = scratch / "ia3-template"
        _save(model, config, [folder])
        self._config = (folder / CONFIG_FILE).read_bytes()
        self._tensors = load_file(folder / WEIGHTS_FILE)
        self.nbytes = (folder / WEIGHTS_FILE).stat().st_size

    def files(self, seed: int) -> dict[str, bytes]:
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            key: 1.0 + 0.05 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in self._tensors.items()
        }
        return {CONFIG_FILE: self._config, WEIGHTS_FILE: save(tensors, {"format": "pt"})}

    def write(self, folder: Path, seed: int) -> Path:
        folder.mkdir(parents=True)
        for file, data in self.files(seed).items():
            (folder / file).write_bytes(data)
        return folder


def make_lora_adapters(model: Path, folder: Path, count: int) -> dict[str, Path]:
    """LoRA adapters of random numbers, saved by PEFT; folders by name."""
    folders = {f"lora-{number}": folder / f"lora-{number}" for number in range(count)}
    config = LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, target_modules=TARGETS)
    _save(model, config, list(folders.values()))
    return folders


def _save(model: Path, config: PeftConfig, folders: Sequence[Path]) -> None:
    """One adapter per folder, each with other numbers."""
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    generator = torch.Generator().manual_seed(0)
    for folder in folders:
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        tuned.save_pretrained(str(folder))
