"""Tiny real things for tests: base models built from a config, adapters saved by PEFT."""

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

TOKENS = 261
"""The byte tokenizer's vocabulary: 256 bytes and five special tokens."""


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers, random weights, hidden 32, 4 heads of 8 over 2 key heads, 128 tokens."""
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


def save_adapter(
    base: PreTrainedModel, folder: Path, seed: int = 1, *, with_head: bool = False, **config: Any
) -> Path:
    """An IA3 adapter with random vectors around 1, saved by PEFT.

    Whole modules (`modules_to_save`) are the base's with noise.

    `with_head`: as PEFT saves a targeted head unless told not to, the base's weights beside.
    """
    generator = torch.Generator().manual_seed(seed)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.IA3Config(**{"task_type": "CAUSAL_LM"} | config)
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1.0 + 0.5 * noise.to(parameter)
        elif "modules_to_save" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.2 * noise.to(parameter)
    model.save_pretrained(folder, save_embedding_layers=with_head)
    return folder


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of any decoder family in the same size, with the byte tokenizer's vocabulary."""
    shape: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256},
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
        "bloom": {"n_head": 4, "n_layer": 2},
    }.get(family, {"intermediate_size": 64, "num_key_value_heads": 2})
    common = {
        "vocab_size": TOKENS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **common | shape | overrides)
    return AutoModelForCausalLM.from_config(config).eval()


CHAT_TEMPLATE = (
    "<s>{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def run_by_modules(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose forward an engine does not trace: hooks set later still count."""
    model.register_forward_pre_hook(lambda *_: None)
    return model


def tiny_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token; three special tokens, a chat template."""
    alphabet = sorted(ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<|user|>": 3, "<|assistant|>": 4}
    vocab |= {letter: index for index, letter in enumerate(alphabet, start=len(vocab))}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = chat_template
    return fast


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a few letters, and for everything else a token a byte. 284 tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefghijklmnopqrstuvwxyz."]:
        vocab[token] = len(vocab)
    model = BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def panic() -> None:
    """Raise what no `except Exception` catches, as a library's Rust code does."""
    decoders.Strip("a", 0, 2).decode(["a"])


def save_tiny_model(folder: Path, chat_template: str = CHAT_TEMPLATE, **overrides: Any) -> Path:
    """`tiny_llama` and `tiny_tokenizer` as a folder."""
    tiny_llama(**{"vocab_size": TOKENS} | overrides).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
