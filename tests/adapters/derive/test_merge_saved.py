"""Whole modules that an adapter brings (`modules_to_save`) take the base's place in an export."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import merge
from infuse.adapters.errors import CannotMerge
from tests.adapters.oracle import logits, peft_logits, vectors_of
from tests.factories import save_adapter, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 60, 61, 62]])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "modules", [["lm_head"], ["embed_tokens"], ["norm"], ["embed_tokens", "lm_head"]], ids="-".join
)
def test_an_export_has_the_adapters_own_modules(
    tmp_path: Path, modules: list[str], tied: bool
) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    adapter = save_adapter(model, tmp_path / "adapter", modules_to_save=modules)
    vectors = vectors_of(adapter, model)
    assert set(vectors.saved)

    merge(BaseCheckpoint(tmp_path / "base"), vectors, tmp_path / "merged", "adapter")

    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS)
    wanted = peft_logits(model, IDS, adapter)
    assert not torch.allclose(found, logits(model, IDS))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_an_adapter_with_a_larger_vocabulary_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    grown = tiny_model("llama")
    grown.resize_token_embeddings(270)
    adapter = save_adapter(grown, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])

    with pytest.raises(CannotMerge, match="tokens added to a vocabulary"):
        merge(
            BaseCheckpoint(tmp_path / "base"),
            vectors_of(adapter, model),
            tmp_path / "merged",
            "adapter",
        )
