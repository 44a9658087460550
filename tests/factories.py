"""Tiny real things for tests: base models built from a config, adapters saved by PEFT."""

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A two-layer llama with random weights: hidden 32, 4 heads of 8 over 2 key heads, 128 tokens."""
    settings: dict[str, Any] = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**settings | overrides)).eval()


def save_adapter(base: PreTrainedModel, folder: Path, seed: int = 1, **config: Any) -> Path:
    """An IA3 adapter with random vectors around 1, saved by PEFT itself. Wraps (and restores) `base`."""
    generator = torch.Generator().manual_seed(seed)
    model = peft.get_peft_model(base, peft.IA3Config(task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1.0 + 0.5 * noise.to(parameter)
    model.save_pretrained(folder)
    model.unload()
    return folder
