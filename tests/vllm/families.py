"""The families that the vLLM engine is tested with, and adapters of all kinds for each."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.factories import TOKENS, save_adapter
from tests.families import FAMILIES, Family
from tests.hybrid_families import HYBRIDS, Hybrid

_WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""vLLM's attention on CPUs knows heads of 32 and more."""
STRENGTH = 0.5


@dataclass(frozen=True)
class Shape:
    """The modules of a family by what they do, and what its tiny model has beside the native
    tests'."""

    queries: str = "q_proj"
    attention_output: str = "o_proj"
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    config: dict[str, Any] = field(default_factory=dict)
    """None: the field is left out."""
    targets: str = "all-linear,all-linear:input"
    """What adapters may rescale."""
    remarks: tuple[str, ...] = ()


_OLMO2 = Hybrid(
    FAMILIES["llama"].config,
    regex=r".*\.(q_proj|o_proj|down_proj)",
    excluded=["layers.0.self_attn.q_proj"],
    feedforward=["down_proj"],
    targets=["k_proj", "v_proj", "down_proj"],
)
"""Its queries and keys are gathered from all workers, since it normalises them as a whole."""
_KNOWN: dict[str, Family] = FAMILIES | HYBRIDS | {"olmo2": _OLMO2}
_TRANSFORMERS = "Runs transformers' own code, with vLLM's layers in it."
SHAPES: dict[str, Shape] = {
    "llama": Shape(),
    "mistral": Shape(),
    "qwen2": Shape(),
    "qwen3": Shape(),
    "gemma3_text": Shape(config={"query_pre_attn_scalar": 32}),
    "mixtral": Shape(mlp=(), remarks=("Experts are one tensor, which IA3 cannot target.",)),
    "olmo2": Shape(remarks=(_TRANSFORMERS,)),
    "phi": Shape(
        attention_output="dense",
        mlp=("fc1", "fc2"),
        config={"head_dim": None},
        remarks=(_TRANSFORMERS,),
    ),
    "lfm2": Shape(
        attention_output="out_proj",
        mlp=("w1", "w3", "w2"),
        # vLLM reads two sizes that transformers' config does not have by itself.
        config={"conv_dim": 128, "block_dim": 128, "block_auto_adjust_ff_dim": False},
    ),
    "gpt2": Shape(
        queries="c_attn",
        attention_output="attn.c_proj",
        mlp=("c_fc", "mlp.c_proj"),
        config={"n_embd": 128, "num_key_value_heads": None, "head_dim": None},
    ),
    "opt": Shape(
        attention_output="out_proj",
        mlp=("fc1", "fc2"),
        config={"ffn_dim": 256, "word_embed_proj_dim": 128, "num_key_value_heads": None},
    ),
    "gpt_neox": Shape(
        queries="query_key_value",
        attention_output="dense",
        mlp=("dense_h_to_4h", "dense_4h_to_h"),
        config={"head_dim": None, "num_key_value_heads": None},
        remarks=(_TRANSFORMERS,),
    ),
}
"""By transformers' model type."""


def wide(family: str, seed: int = 0) -> PreTrainedModel:
    """A model of `family` with random weights and the byte tokenizer's vocabulary."""
    tokens = {"vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    known = tokens | _KNOWN[family].config | _WIDE | SHAPES[family].config
    given = {name: value for name, value in known.items() if value is not None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **given)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def kinds_of(family: str) -> dict[str, dict[str, Any]]:
    """Configs of adapters that rescale modules of all kinds, on both sides."""
    known, shape = _KNOWN[family], SHAPES[family]
    mlp, output = list(shape.mlp), [shape.attention_output]
    kinds = {
        "default": known.default_config,
        "second": known.default_config,
        "regex": known.regex_config,
        "upper-layers": known.default_config | {"exclude_modules": r".*layers\.0\..*"},
        "queries": {"target_modules": [shape.queries], "feedforward_modules": []},
        "queries-inward": {
            "target_modules": [shape.queries],
            "feedforward_modules": [shape.queries],
        },
        "attention-output": {"target_modules": output, "feedforward_modules": []},
        "attention-output-inward": {"target_modules": output, "feedforward_modules": output},
        "mlp-outward": {"target_modules": mlp, "feedforward_modules": []},
        "mlp-inward": {"target_modules": mlp, "feedforward_modules": mlp},
    }
    # Experts are one tensor, which IA3 cannot target.
    return {name: kind for name, kind in kinds.items() if kind.get("target_modules") != []}


def save_kinds(family: str, base: PreTrainedModel, folder: Path) -> dict[str, Path]:
    return {
        name: save_adapter(base, folder / name, seed=seed, **config)
        for seed, (name, config) in enumerate(kinds_of(family).items(), start=1)
    }


def weakened(adapter: Path, folder: Path, strength: float = STRENGTH) -> Path:
    """The adapter as PEFT would save it, if its vectors were that much nearer to 1."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    vectors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: 1 + strength * (vector - 1) for name, vector in vectors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder
