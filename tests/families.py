"""Tiny random models of every family in PEFT's IA3 table that generates text."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from tests.factories import TOKENS

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_LLAMA: dict[str, Any] = _DECODER | {"intermediate_size": 64, "num_key_value_heads": 2}
_HEAD = {"head_dim": 8}
_GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 256, "initializer_range": 0.2}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "initializer_factor": 1.0,
}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is built, and adapters of two kinds for it."""

    config: dict[str, Any]
    regex: str
    """A `target_modules` expression beside the defaults."""
    excluded: list[str]
    """`exclude_modules` with it."""
    feedforward: list[str] = field(default_factory=list)
    """Which of the expression's modules are adapted at their input."""
    targets: list[str] | None = None
    """The defaults, where PEFT's table has the family under another name."""
    encoder_decoder: bool = False
    remarks: tuple[str, ...] = ()
    """What a user of the family should know."""

    @property
    def default_config(self) -> dict[str, Any]:
        """An IA3 config with the family's default targets."""
        named = {"target_modules": self.targets, "feedforward_modules": ["down_proj"]}
        return {"task_type": self.task_type} | (named if self.targets else {})

    @property
    def regex_config(self) -> dict[str, Any]:
        return {
            "task_type": self.task_type,
            "target_modules": self.regex,
            "exclude_modules": self.excluded,
            "feedforward_modules": self.feedforward,
        }

    @property
    def task_type(self) -> str:
        return "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM"


def _llama_like(extra: dict[str, Any] | None = None) -> Family:
    return Family(
        _LLAMA | (extra or {}),
        regex=r".*\.(q_proj|o_proj|down_proj)",
        excluded=["layers.0.self_attn.q_proj"],
        feedforward=["down_proj"],
    )


def _gpt2_like(extra: dict[str, Any] | None = None) -> Family:
    return Family(
        _GPT2 | (extra or {}),
        regex=r".*\.(attn\.c_proj|mlp\.c_fc|mlp\.c_proj)",
        excluded=["h.0.mlp.c_fc"],
        feedforward=["mlp.c_proj"],
        remarks=("Fused queries, keys and values: PEFT's default rescales all three.",),
    )


def _fused(config: dict[str, Any]) -> Family:
    return Family(
        config,
        regex=r".*\.(dense|dense_h_to_4h|dense_4h_to_h)",
        excluded=["h.0.mlp.dense_h_to_4h"],
        feedforward=["dense_4h_to_h"],
        remarks=("Fused queries, keys and values: PEFT's default rescales all three.",),
    )


def _t5_like(feedforward: str) -> Family:
    return Family(
        _T5 | {"feed_forward_proj": feedforward, "decoder_start_token_id": 0},
        regex=r"decoder\..*\.(q|k|wo)",
        excluded=["decoder.block.0.layer.0.SelfAttention.q"],
        feedforward=["wo"],
        encoder_decoder=True,
        remarks=("`/v1/completions` and `/v1/rank`; the prompt's own tokens are not scored.",),
    )


FAMILIES: dict[str, Family] = {
    "llama": _llama_like(),
    "llama4_text": Family(
        _LLAMA
        | _HEAD
        | {
            "intermediate_size_mlp": 64,
            "num_hidden_layers": 4,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layer_interval": 2,
            "floor_scale": 16,
        },
        regex=r".*\.(q_proj|o_proj|down_proj)",
        excluded=["layers.0.self_attn.q_proj"],
        feedforward=["down_proj"],
        targets=["q_proj", "v_proj", "down_proj"],
        remarks=(
            "Text only. PEFT's table has it as `llama4`: name `target_modules` in the config.",
            "Experts are one tensor, which IA3 cannot target.",
        ),
    ),
    "mistral": _llama_like({"sliding_window": 8}),
    "mixtral": Family(
        _LLAMA | {"num_local_experts": 4, "sliding_window": None},
        regex=r".*\.(q_proj|o_proj)",
        excluded=["layers.0.self_attn.q_proj"],
        remarks=("PEFT's default `w2` matches nothing: experts are one tensor.",),
    ),
    "qwen2": _llama_like(),
    "qwen3": _llama_like(_HEAD),
    "gemma": _llama_like(_HEAD | {"num_key_value_heads": 1}),
    "gemma2": _llama_like(_HEAD | {"sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": _llama_like(
        _HEAD | {"num_hidden_layers": 4, "sliding_window": 8, "sliding_window_pattern": 2}
    ),
    "phi": Family(
        _LLAMA,
        regex=r".*\.(q_proj|dense|fc2)",
        excluded=["layers.0.self_attn.q_proj"],
        feedforward=["fc2"],
    ),
    "gpt2": _gpt2_like(),
    "gpt_bigcode": _gpt2_like(),
    "gpt_neo": Family(
        _DECODER
        | {
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "intermediate_size": 64,
        },
        regex=r".*\.(q_proj|out_proj|c_fc|c_proj)",
        excluded=["h.0.attn.attention.q_proj"],
        feedforward=["c_proj"],
    ),
    "gptj": Family(
        _GPT2 | {"rotary_dim": 4, "n_inner": 64},
        regex=r".*\.(q_proj|out_proj|fc_in|fc_out)",
        excluded=["h.0.attn.q_proj"],
        feedforward=["fc_out"],
    ),
    "gpt_neox": Family(
        _LLAMA,
        regex=r".*\.(dense|dense_h_to_4h|dense_4h_to_h)",
        excluded=["layers.0.mlp.dense_h_to_4h"],
        feedforward=["dense_4h_to_h"],
        remarks=("Fused queries, keys and values: PEFT's default rescales all three.",),
    ),
    "opt": Family(
        _LLAMA | {"ffn_dim": 64, "word_embed_proj_dim": 32},
        regex=r".*\.(q_proj|out_proj|fc1|fc2)",
        excluded=["layers.0.self_attn.q_proj"],
        feedforward=["fc2"],
    ),
    "bloom": _fused(_DECODER | {"n_head": 4, "n_layer": 2}),
    "falcon": _fused(_DECODER | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-alibi": _fused(
        _DECODER | {"alibi": True, "parallel_attn": False, "multi_query": False}
    ),
    "t5": _t5_like("relu"),
    "mt5": _t5_like("gated-gelu"),
    "bart": Family(
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 256,
            "init_std": 0.2,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        regex=r"model\.decoder\..*\.(q_proj|out_proj|fc1|fc2)",
        excluded=["decoder.layers.0.self_attn.q_proj"],
        feedforward=["fc2"],
        encoder_decoder=True,
        remarks=(
            "As T5. `forced_bos_token_id` is obeyed; `forced_eos_token_id`, which overwrites the "
            "last token of an answer cut short, is not.",
        ),
    ),
}
"""By transformers' model type; what follows a hyphen is a variant."""


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of `family` with random weights and the byte tokenizer's vocabulary."""
    known = FAMILIES[family]
    tokens = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family.partition("-")[0], **tokens | known.config | overrides)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if known.encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    return model
