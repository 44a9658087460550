"""A head that shares its weights with the embeddings is merged alone; PEFT's merge scales both."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import effective_vectors, read_checkpoint
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import check_room, merge
from infuse.adapters.errors import StoreFull
from tests.adapters.derive.test_merge_families import load, logits
from tests.factories import save_adapter
from tests.families import FAMILIES, tiny

WEIGHTS = "model.safetensors"
TIED = ["llama", "gemma2", "gpt2", "opt", "bloom", "falcon", "t5", "mt5", "bart"]


def head_adapter(family: str, model: PreTrainedModel, folder: Path, side: str = "output") -> Path:
    config = {
        "task_type": FAMILIES[family].task_type,
        "target_modules": ["lm_head"],
        "feedforward_modules": ["lm_head"] if side == "input" else [],
    }
    save_adapter(model, folder, **config)
    # PEFT saves the whole head beside its vector.
    rewrite(folder / "adapter_model.safetensors", {}, without=".base_layer.")
    return folder


def merged(family: str, base: Path, adapter: Path, output: Path) -> PreTrainedModel:
    checkpoint = BaseCheckpoint(base)
    vectors = effective_vectors(read_checkpoint(adapter), checkpoint.modules)
    merge(checkpoint, vectors, output, "head")
    return load(family, output)


def assert_is_peft_unmerged(family: str, found: PreTrainedModel, base: Path, adapter: Path) -> None:
    plain = load(family, base)
    embeddings = plain.get_input_embeddings().weight.clone()
    wanted = logits(family, PeftModel.from_pretrained(plain, adapter))
    assert not torch.allclose(wanted, logits(family, load(family, base)))
    torch.testing.assert_close(logits(family, found), wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.get_input_embeddings().weight, embeddings)


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_is_merged_alone(tmp_path: Path, family: str, side: str) -> None:
    model = tiny(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapter = head_adapter(family, model, tmp_path / "a", side)
    found = merged(family, tmp_path / "base", adapter, tmp_path / "merged")

    assert_is_peft_unmerged(family, found, tmp_path / "base", adapter)


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
def test_a_tied_head_that_is_in_the_files_too_is_merged_alone(tmp_path: Path, family: str) -> None:
    """Files that were converted from pickles are like this."""
    model = tiny(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapter = head_adapter(family, model, tmp_path / "a")
    rewrite(
        tmp_path / "base" / WEIGHTS,
        {"lm_head.weight": model.get_output_embeddings().weight.clone()},
    )
    found = merged(family, tmp_path / "base", adapter, tmp_path / "merged")

    assert_is_peft_unmerged(family, found, tmp_path / "base", adapter)


def test_embeddings_that_are_in_the_files_as_the_head_alone_are_kept(tmp_path: Path) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapter = head_adapter("llama", model, tmp_path / "a")
    head = {"lm_head.weight": model.get_output_embeddings().weight.clone()}
    rewrite(tmp_path / "base" / WEIGHTS, head, without="model.embed_tokens.weight")
    found = merged("llama", tmp_path / "base", adapter, tmp_path / "merged")

    assert_is_peft_unmerged("llama", found, tmp_path / "base", adapter)


@pytest.mark.parametrize("family", ["t5", "mt5", "llama"])
def test_a_head_that_differs_in_the_files_is_not_tied_whatever_the_config_says(
    tmp_path: Path, family: str
) -> None:
    """The configs of T5 1.1 and MT5 cannot say that the head is untied."""
    model = tiny(family, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapter = head_adapter(family, model, tmp_path / "a")
    other = torch.randn(model.get_output_embeddings().weight.shape)
    rewrite(tmp_path / "base" / WEIGHTS, {"lm_head.weight": other})
    found = merged(family, tmp_path / "base", adapter, tmp_path / "merged")

    assert_is_peft_unmerged(family, found, tmp_path / "base", adapter)


@pytest.mark.parametrize("family", ["phi", "gptj", "gpt_neox", "mistral"])
def test_a_head_of_its_own_is_merged_with_its_bias(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "base")
    adapter = head_adapter(family, model, tmp_path / "a")
    found = merged(family, tmp_path / "base", adapter, tmp_path / "merged")

    assert_is_peft_unmerged(family, found, tmp_path / "base", adapter)


def test_the_disk_must_have_room_for_the_untied_head_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapters = {
        "head": head_adapter("llama", model, tmp_path / "head"),
        "other": save_adapter(model, tmp_path / "other"),
    }
    base = BaseCheckpoint(tmp_path / "base")
    vectors = {
        name: effective_vectors(read_checkpoint(adapter), base.modules)
        for name, adapter in adapters.items()
    }
    room = base.nbytes + (1 << 20) + model.lm_head.weight.nbytes - 1
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": room}))
    check_room(base, vectors["other"], tmp_path)
    with pytest.raises(StoreFull, match="merged model takes"):
        check_room(base, vectors["head"], tmp_path)


def rewrite(file: Path, more: dict[str, torch.Tensor], without: str = "nothing") -> None:
    tensors = {key: each for key, each in load_file(file).items() if without not in key}
    save_file(tensors | more, file, metadata={"format": "pt"})
