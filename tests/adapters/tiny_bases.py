"""Tiny base models of several families, random weights, made from a config."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers, hidden 32; its linear layers are `Conv1D`, its head is tied."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()


def tiny_opt(seed: int = 0) -> OPTForCausalLM:
    """Two layers, hidden 32; its linear layers have biases."""
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.2,
    )
    return OPTForCausalLM(config).eval()


def tiny_t5(seed: int = 0) -> T5ForConditionalGeneration:
    """One layer on each side, hidden 32; its feed-forward reads `self.wo.weight.dtype`."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4
    )
    return T5ForConditionalGeneration(config).eval()
