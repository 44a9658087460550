"""A tiny encoder-decoder; `tests.factories.tiny_model` makes decoders."""

import torch
from transformers import T5Config, T5ForConditionalGeneration


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    """A T5 with a layer on each side, hidden 32; its feed-forward reads `self.wo.weight.dtype`."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4
    )
    return T5ForConditionalGeneration(config).eval()
