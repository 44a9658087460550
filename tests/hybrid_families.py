"""Tiny random models of families that carry a state from token to token."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.factories import TOKENS
from tests.families import Family

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXED = ["linear_attention", "full_attention"] * 2
_SHARED = _EXPERTS | {"shared_expert_intermediate_size": 32}
_DELTA = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": _MIXED,
}
_MAMBA1 = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_PURE = {
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": 3,
    "conv_kernel": 4,
    "initializer_range": 0.2,
}
_LATENT = {
    "layer_types": _MIXED,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


class Hybrid(Family):
    """PEFT's table has none of them: adapters name their targets."""

    @property
    def default_config(self) -> dict[str, Any]:
        targets = {"target_modules": self.targets, "feedforward_modules": self.feedforward}
        return {"task_type": self.task_type} | targets


def _family(
    config: dict[str, Any], targets: list[str], feedforward: list[str], *remarks: str
) -> Hybrid:
    return Hybrid(
        config,
        regex=rf".*\.({'|'.join([*targets, 'o_proj'])})",
        excluded=[
            f"layers.0.{part}.{targets[0]}"
            for part in ("linear_attn", "conv", "mamba", "mixer", "self_attn")
        ],
        feedforward=feedforward,
        targets=targets,
        remarks=remarks,
    )


_MIXERS = ["linear_attn", "conv", "mamba", "mixer", "self_attn"]
_NO_CHUNKS = "Prompts are computed in one piece: the scan of Mamba 1 does not go on from a state."
_PROJ = ["k_proj", "v_proj", "down_proj"]
_NO_WINDOW = "Its config names no window: set `max-model-len`."
HYBRIDS: dict[str, Hybrid] = {
    "qwen3_next": _family(
        _DECODER | _DELTA | _SHARED | {"initializer_range": 0.1},
        ["in_proj_qkvz", "out_proj", *_PROJ],
        ["out_proj", "down_proj"],
    ),
    "qwen3_5_text": _family(_DECODER | _DELTA, ["in_proj_qkv", "in_proj_a", *_PROJ], ["down_proj"]),
    "qwen3_5_moe_text": _family(
        _DECODER | _DELTA | _SHARED, ["in_proj_qkv", "in_proj_z", *_PROJ], ["down_proj"]
    ),
    "olmo_hybrid": _family(_DECODER | _DELTA, ["a_proj", *_PROJ], ["down_proj"]),
    "lfm2": _family(
        _DECODER | {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2},
        ["in_proj", "k_proj", "v_proj", "w2"],
        ["w2"],
    ),
    "lfm2_moe": _family(
        _DECODER
        | _EXPERTS
        | {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
        ["in_proj", "k_proj", "v_proj", "w2"],
        ["w2"],
    ),
    "lfm3": _family(
        _DECODER | {"conv_L_cache": 3, "sliding_window": 8},
        ["in_proj", "k_proj", "v_proj", "w2"],
        ["w2"],
    ),
    "jamba": _family(
        _DECODER
        | _MAMBA1
        | {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
        },
        ["in_proj", "x_proj", *_PROJ],
        ["down_proj"],
        _NO_CHUNKS,
    ),
    "bamba": _family(
        _DECODER | _MAMBA2 | {"attn_layer_indices": [1, 3]}, ["in_proj", *_PROJ], ["down_proj"]
    ),
    "granitemoehybrid": _family(
        _DECODER
        | _MAMBA2
        | {
            "layer_types": _MIXED,
            "num_local_experts": 4,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
        },
        ["in_proj", "k_proj", "v_proj", "output_linear"],
        ["output_linear"],
    ),
    "falcon_h1": _family(
        _DECODER | _MAMBA2 | {"mamba_d_ssm": 64}, ["in_proj", *_PROJ], ["down_proj"]
    ),
    "zamba": _family(
        _DECODER
        | _MAMBA1
        | {
            "n_mamba_heads": 2,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        ["in_proj", *_PROJ],
        ["down_proj"],
        _NO_CHUNKS,
    ),
    "zamba2": _family(
        _DECODER
        | {
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 8,
            "chunk_size": 8,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        },
        ["in_proj", *_PROJ],
        ["down_proj"],
    ),
    "nemotron_h": _family(
        {name: value for name, value in _DECODER.items() if name != "num_hidden_layers"}
        | {
            "layers_block_type": ["mamba", "attention", "moe", "mamba"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
        ["in_proj", *_PROJ],
        ["down_proj"],
    ),
    "kimi_linear": _family(
        _DECODER
        | _LATENT
        | {"mlp_layer_types": ["dense", "sparse"] * 2, "linear_head_dim": 8, "linear_num_heads": 4},
        ["q_proj", "b_proj", *_PROJ],
        ["down_proj"],
    ),
    "bailing_hybrid": _family(
        _DECODER | _LATENT | {"n_group": 2, "topk_group": 1},
        ["q_proj", "b_proj", *_PROJ],
        ["down_proj"],
    ),
    "zaya": _family(
        _DECODER
        | {
            "num_experts": 4,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
        },
        ["k_proj", "v_proj_current", "o_proj"],
        ["o_proj"],
    ),
    "minimax": _family(
        _DECODER | {"layer_types": _MIXED, "num_local_experts": 4, "block_size": 8},
        ["qkv_proj", "k_proj", "v_proj", "out_proj"],
        ["out_proj"],
    ),
    "inkling_text": _family(
        _DECODER
        | {
            "logits_mup_width_multiplier": 1.0,
            "sliding_window_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
        ["k_proj", "v_proj", "o_proj"],
        ["o_proj"],
    ),
    "mamba": _family(
        _PURE | {"time_step_rank": 4},
        ["in_proj", "x_proj", "out_proj"],
        ["out_proj"],
        _NO_CHUNKS,
        _NO_WINDOW,
    ),
    "falcon_mamba": _family(
        _PURE | {"time_step_rank": 4},
        ["in_proj", "x_proj", "out_proj"],
        ["out_proj"],
        _NO_CHUNKS,
        _NO_WINDOW,
    ),
    "mamba2": _family(
        _PURE | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        ["in_proj", "out_proj"],
        ["out_proj"],
        _NO_WINDOW,
    ),
}
"""By transformers' model type."""
REFUSED: dict[str, dict[str, Any]] = {
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 256},
    "recurrent_gemma": _DECODER | {"lru_width": 32, "attention_window_size": 8},
    "xlstm": {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4},
    "qwen4_exp_text": _DECODER
    | _DELTA
    | _SHARED
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}
"""Configs of those that are refused."""


def tiny_hybrid(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family` with random weights and the byte tokenizer's vocabulary."""
    shape = HYBRIDS[family].config if family in HYBRIDS else REFUSED[family]
    tokens = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(family, **tokens | shape)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model
