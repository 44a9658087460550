"""Folders that PEFT writes, and that are not the two plain files: how each is answered."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from tests.factories import save_adapter

Make = Callable[[PreTrainedModel, Path], Path]


@dataclass(frozen=True)
class Case:
    make: Make
    answer: tuple[str, str, str] | None = None
    """The field, and parts of what is wrong with it and of how to mend it; None: it loads."""


def named(base: PreTrainedModel, folder: Path) -> Path:
    model = PeftModel.from_pretrained(
        base, save_adapter(base, folder / "1"), adapter_name="support"
    )
    model.save_pretrained(folder / "out")
    assert not (folder / "out" / CONFIG_FILE).exists()
    return folder / "out"


def default_and_named(base: PreTrainedModel, folder: Path) -> Path:
    """The plain one in the folder itself is PEFT's choice."""
    model = PeftModel.from_pretrained(base, save_adapter(base, folder / "1"))
    model.load_adapter(save_adapter(base, folder / "2", seed=2), "other")
    model.save_pretrained(folder / "out")
    return folder / "out"


def two_named(base: PreTrainedModel, folder: Path) -> Path:
    out = named(base, folder)
    shutil.copytree(out / "support", out / "billing")
    return out


def pickled(base: PreTrainedModel, folder: Path) -> Path:
    model = PeftModel.from_pretrained(base, save_adapter(base, folder / "1"))
    model.save_pretrained(folder / "out", safe_serialization=False)
    return folder / "out"


def change(folder: Path, **fields: Any) -> Path:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def whole_names(base: PreTrainedModel, folder: Path) -> Path:
    """What PEFT's shortening of `target_modules` left, before it passed IA3 over."""
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    return change(save_adapter(base, folder), feedforward_modules=names)


def stray_names(base: PreTrainedModel, folder: Path) -> Path:
    return change(save_adapter(base, folder), feedforward_modules=["up_proj"])


def no_feedforward(base: PreTrainedModel, folder: Path) -> Path:
    return change(save_adapter(base, folder), feedforward_modules=[])


def too_much_feedforward(base: PreTrainedModel, folder: Path) -> Path:
    return change(save_adapter(base, folder), feedforward_modules=["down_proj", "k_proj"])


def state_dict_keys(base: PreTrainedModel, folder: Path) -> Path:
    save_adapter(base, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({f"{key}.default": tensor for key, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    return folder


def classifier(base: PreTrainedModel, folder: Path) -> Path:
    torch.manual_seed(0)
    other = AutoModelForSequenceClassification.from_config(base.config)
    get_peft_model(other, IA3Config(task_type="SEQ_CLS")).save_pretrained(folder)
    return folder


def classifier_without_head(base: PreTrainedModel, folder: Path) -> Path:
    """Its answer says how it is mended."""
    classifier(base, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    vectors = {key: tensor for key, tensor in tensors.items() if "ia3_l" in key}
    save_file(vectors, folder / WEIGHTS_FILE)
    return change(folder, modules_to_save=None)


def empty(_: PreTrainedModel, folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing here")
    return folder


CASES = {
    "sub-folder of a named adapter": Case(named),
    "default beside a named one": Case(default_and_named),
    "two named": Case(two_named, (CONFIG_FILE, "lies in 2 folders: billing, support", "one of")),
    "adapter_model.bin only": Case(pickled, (WEIGHTS_FILE, "pickled", "save_pretrained(")),
    "whole names in feedforward_modules": Case(whole_names),
    "stray feedforward_modules": Case(
        stray_names, ("feedforward_modules", "not in it: ['up_proj']", "take them out")
    ),
    "feedforward_modules []": Case(
        no_feedforward, ("down_proj.ia3_l", "does not name", "add it to feedforward_modules")
    ),
    "too many feedforward_modules": Case(
        too_much_feedforward, ("k_proj.ia3_l", "names the module", "take it out of")
    ),
    "keys that end in default": Case(state_dict_keys),
    "SEQ_CLS": Case(classifier, ("task_type", "SEQ_CLS: its head (score", "CAUSAL_LM")),
    "SEQ_CLS without its head": Case(classifier_without_head),
    "no adapter": Case(empty, (CONFIG_FILE, "is missing", "save_pretrained")),
}
