"""Loads a base model from a hub id, a folder, or the package that ships the default model."""

from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from infuse.server.engine.errors import UnsupportedModel
from infuse.server.engine.model_files import (
    default_model_folder,
    end_tokens,
    refusing_models,
    served_name,
)
from infuse.server.engine.native.model.packing import speed_of
from infuse.server.engine.native.model.quantization import Quantization, loading_arguments, settle

_WORTH_ROUNDING = 1.2
"""How many times as fast as float32 bfloat16 must be on a CPU for it to be the default."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model that is ready to run, with its tokenizer and configuration."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    """The hub id, or the folder's name."""
    generation_config: GenerationConfig

    @property
    def end_tokens(self) -> frozenset[int]:
        return end_tokens(self.generation_config, self.tokenizer)

    def decoder_start(self) -> tuple[int, ...] | None:
        """The tokens that an encoder-decoder's decoder begins with, as in transformers' `generate`.
        None for other models. Raises UnsupportedModel."""
        if not self.model.config.is_encoder_decoder:
            return None
        asked = self.generation_config
        start = asked.decoder_start_token_id
        if start is None:
            start = getattr(self.model.config, "decoder_start_token_id", None)
        if start is None:
            raise UnsupportedModel("the model's config names no decoder_start_token_id")
        forced = [] if asked.forced_bos_token_id is None else [int(asked.forced_bos_token_id)]
        return (int(start), *forced)


def load_model(
    model: str | None,
    device: str = "auto",
    dtype: str = "auto",
    quantization: Quantization = "none",
) -> LoadedModel:
    """Load a hub id, a folder, or (None) the default model.

    `device` "auto" is CUDA if there is a GPU. `dtype` "auto" is the checkpoint's own on CUDA. On
    the CPU it is float32, except for a checkpoint in bfloat16 if this processor is faster in it.
    `quantization` "none" loads a checkpoint that is quantised already as it is. Raises
    ModelNotFound and UnsupportedModel.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModel("device cuda was asked for, but torch sees no GPU here")
    source = str(default_model_folder()) if model is None else model
    with refusing_models(source):
        config = AutoConfig.from_pretrained(source)
        if dtype == "auto" and device == "cpu":
            dtype = _dtype_on_cpu(config.dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        how = loading_arguments(source, quantization, device, dtype)
        base = auto.from_pretrained(source, dtype=dtype, **how)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"'{source}' has no tokenizer.json, which streaming needs")
    base.requires_grad_(False)
    base.train(False)
    if how["device_map"] is None:
        base.to(device)  # type: ignore[arg-type]
    else:
        settle(base, device)
    return LoadedModel(base, tokenizer, served_name(model), base.generation_config)


def _dtype_on_cpu(saved: torch.dtype | None) -> str:
    faster = saved == torch.bfloat16 and speed_of(torch.bfloat16) >= _WORTH_ROUNDING
    return "bfloat16" if faster else "float32"
