"""Merged exports of every family: plain transformers computes what PEFT's merged model computes."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import effective_vectors, product, read_checkpoint
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import merge
from tests.factories import save_adapter
from tests.families import FAMILIES, tiny

IDS = torch.tensor([[5, 6, 7, 8, 9, 60, 61, 62, 63, 64, 65, 66]])


def load(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if FAMILIES[family].encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_pretrained(folder, dtype=dtype)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # The default one knows no float64.
    return model


def with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Give the biases random values, as trained models have: those of a new model are zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def logits(family: str, model: PreTrainedModel) -> torch.Tensor:
    more = {"decoder_input_ids": IDS[:, :5]} if FAMILIES[family].encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def keys_of(folder: Path) -> set[str]:
    return {key for file in folder.glob("*.safetensors") for key in load_file(file)}


def by_peft(base: PreTrainedModel, *adapters: Path) -> PreTrainedModel:
    model = PeftModel.from_pretrained(base, adapters[0], "0")
    for number, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, str(number))
    names = [str(number) for number in range(len(adapters))]
    return model.merge_and_unload(safe_merge=True, adapter_names=names)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_what_pefts_merged_model_does(
    tmp_path: Path, family: str
) -> None:
    known = FAMILIES[family]
    folder = tmp_path / "base"
    model = with_biases(tiny(family))
    model.save_pretrained(folder, max_shard_size="60KB")
    base = BaseCheckpoint(folder)
    assert len(base.shards) > 1
    adapters = [
        save_adapter(model, tmp_path / "default", seed=1, **known.default_config),
        save_adapter(model, tmp_path / "regex", seed=2, **known.regex_config),
    ]
    vectors = [effective_vectors(read_checkpoint(adapter), base.modules) for adapter in adapters]
    plain = logits(family, load(family, folder))
    for each, adapter in zip(vectors, adapters, strict=True):
        output = tmp_path / f"merged-{adapter.name}"
        merge(base, each, output, adapter.name)
        found = logits(family, load(family, output))
        assert keys_of(output) == keys_of(folder)
        assert not torch.allclose(found, plain)
        assert torch.equal(found, logits(family, by_peft(load(family, folder), adapter)))

    merge(base, product(vectors), tmp_path / "both", "default * regex")
    found = logits(family, load(family, tmp_path / "both"))
    exact = logits(family, by_peft(load(family, folder, torch.float64), *adapters))
    theirs = logits(family, by_peft(load(family, folder), *adapters))
    # PEFT rounds after each adapter, we once.
    assert (found - exact).abs().max() <= 2 * (theirs - exact).abs().max()
