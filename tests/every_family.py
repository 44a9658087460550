"""A tiny random model of every causal and encoder-decoder class that transformers has."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from tests.factories import TOKENS
from tests.families import FAMILIES
from tests.hybrid_families import HYBRIDS, REFUSED

CAUSAL = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
SEQ2SEQ = sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
TYPES = sorted({*CAUSAL, *SEQ2SEQ})
ALONE = "/decoder"
"""What follows the type of an encoder-decoder in the name of its decoder alone."""
WINDOW = 8

_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "seq_length", "n_ctx"), 256),
    **dict.fromkeys(("initializer_range", "init_std"), 0.2),
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "attention_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "window_size": WINDOW,
    "vocab_size_per_layer_input": TOKENS,
    "hidden_size_per_layer_input": 8,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    "word_embed_proj_dim": 32,
}
"""What a config's field is in a tiny model, wherever a config has that field."""
_TOKENS = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {"is_decoder": True}
_SLIDING = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_GEMMA2 = {
    **{name: _SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
    **{name: _SMALL[name] for name in ("num_key_value_heads", "head_dim", "intermediate_size")},
    **{name: _SMALL[name] for name in ("max_position_embeddings", "initializer_range")},
    "query_pre_attn_scalar": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size": TOKENS,
}
_OWN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
            _DECODER,
        ),
        **dict.fromkeys(("rembert", "roberta", "roc_bert", "roformer", "xlm-roberta"), _DECODER),
        **dict.fromkeys(("bert-generation", "roberta-prelayernorm", "xlm-roberta-xl"), _DECODER),
        "xmod": _DECODER | {"default_language": "en_XX"},
        **dict.fromkeys(("qwen2", "qwen3"), _SLIDING),
        "mixtral": {"sliding_window": WINDOW},
        "codegen": {"rotary_dim": 8},
        "cohere_compass_text": {
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
        },
        "dots3_note_text": {
            **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 4),
            **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_v_head_dim"), 8),
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "mlp_layer_types": ["dense", "sparse"],
            "index_head_dim": 8,
            "index_n_heads": 4,
            "index_topk": 8,
        },
        "dbrx": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
            "ffn_config": {
                "hidden_size": 32,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
        "reformer": _DECODER
        | {
            "axial_pos_embds_dim": (16, 16),
            "axial_pos_shape": (16, 16),
            "attention_head_size": 8,
            "attn_layers": ["local", "lsh"],
            "local_attn_chunk_length": 8,
            "lsh_attn_chunk_length": 8,
            "num_buckets": 4,
        },
        "t5gemma": {"encoder": _GEMMA2, "decoder": _GEMMA2, "decoder_start_token_id": 2},
        "gemma3n_text": {"num_kv_shared_layers": 0},
    }
)
"""What else a type needs. Those that were made for other tasks are causal as decoders only."""
_WHOLE = {"dbrx", "moshi", "mpt", "t5gemma"}
"""Types whose parts' configs do not make them several models, or whose parts are as small."""


def config_of(kind: str, **overrides: Any) -> PreTrainedConfig:
    """A config with everything small, and with every window that it knows."""
    own = _OWN.get(kind, {})
    if kind in FAMILIES:
        small = FAMILIES[kind].config
    elif kind in HYBRIDS:
        small = HYBRIDS[kind].config
    else:
        small = REFUSED.get(kind) or _small(kind)
    start = {"decoder_start_token_id": 2} if kind in SEQ2SEQ else {}
    return AutoConfig.for_model(kind, **(_TOKENS | start | small | own | overrides))


def _small(kind: str) -> dict[str, Any]:
    known = AutoConfig.for_model(kind).get_text_config().to_dict()
    small = {name: value for name, value in _SMALL.items() if name in known}
    if isinstance(known.get("layer_types"), list):
        small["layer_types"] = _layer_types(known)
        for name in ("num_hidden_layers", "num_layers"):
            if name in small:
                small[name] = len(small["layer_types"])
    if "kv_lora_rank" in known:
        # Latent attention has keys of its own for each head, and rotates a part of them.
        small |= {"num_key_value_heads": 4, "head_dim": 8}
    return small


def parts_of(kind: str) -> tuple[str, ...]:
    """The models that a type is made of, where it is more than one decoder or encoder-decoder."""
    parts = CONFIG_MAPPING[kind].sub_configs
    return () if kind in _WHOLE else tuple(parts)


def not_tried(kind: str) -> str:
    """Why there is no tiny model of a type; empty where there is one."""
    kind = kind.removesuffix(ALONE)
    if not (parts := parts_of(kind)):
        return ""
    text = getattr(CONFIG_MAPPING[kind].sub_configs.get("text_config"), "model_type", "")
    part = f"; its text part is `{text}`" if text in TYPES else ""
    return f"made of several models ({', '.join(parts)}){part}"


CASES = sorted([*TYPES, *(kind + ALONE for kind in {*CAUSAL} & {*SEQ2SEQ} if not not_tried(kind))])
"""What is tried, or said why it is not: each class once."""


def _layer_types(known: dict[str, Any]) -> list[str]:
    """One layer of each kind that is usual, and one with a window where the config knows it; two
    layers at least."""
    kinds = list(dict.fromkeys(known["layer_types"]))
    if kinds == ["full_attention"] and "sliding_window" in known:
        kinds = ["sliding_attention", "full_attention"]
    return kinds if len(kinds) > 1 else kinds * 2


def tiny_of(kind: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model with random weights, of a type or of a type's decoder alone."""
    kind, _, alone = kind.partition("/")
    config = config_of(kind, **overrides)
    torch.manual_seed(seed)
    auto = AutoModelForSeq2SeqLM if kind in SEQ2SEQ and not alone else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    return model
