"""PEFT itself: what an adapter does, in a fresh model of its own."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors, effective_vectors, read_checkpoint
from infuse.adapters.checkpoint.targets import BaseModules


def with_peft(base: PreTrainedModel, *folders: Path) -> PreTrainedModel:
    """Copy `base` with all these adapters active at once; without any, it is a plain copy."""
    base = copy.deepcopy(base)
    if not folders:
        return base
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=str(index))
    model.base_model.set_adapter([str(index) for index in range(len(folders))])
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


@torch.no_grad()
def peft_logits(base: PreTrainedModel, ids: torch.Tensor, *folders: Path) -> torch.Tensor:
    return logits(with_peft(base, *folders), ids)


def vectors_of(folder: Path, base: PreTrainedModel) -> AdapterVectors:
    return effective_vectors(read_checkpoint(folder), BaseModules.of(base))
