"""Merged folders hold PEFT's merged weights, and plain transformers loads them."""

import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    effective_vectors,
    product,
    read_checkpoint,
)
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.derive.merge import merge
from infuse.adapters.errors import CannotMerge, StoreFull
from tests.factories import save_adapter, tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "outward": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": []},
    "all-linear": {"target_modules": "all-linear", "feedforward_modules": r".*down_proj"},
}


def saved(folder: Path, family: str = "llama", **overrides: Any) -> BaseCheckpoint:
    tiny_model(family, **overrides).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return BaseCheckpoint(folder)


def vectors_of(base: BaseCheckpoint, adapter: Path) -> AdapterVectors:
    return effective_vectors(read_checkpoint(adapter), base.modules)


def by_peft(folder: Path, *adapters: Path) -> PreTrainedModel:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), adapters[0], "0"
    )
    for number, adapter in enumerate(adapters[1:], start=1):
        model.load_adapter(adapter, str(number))
    names = [str(number) for number in range(len(adapters))]
    return model.merge_and_unload(safe_merge=True, adapter_names=names)


def assert_same_weights(found: PreTrainedModel, wanted: PreTrainedModel, exact: bool) -> None:
    theirs = wanted.state_dict()
    ours = found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_is_pefts_merge_bit_for_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    adapter = save_adapter(tiny_model("llama"), tmp_path / "a", **KINDS[kind])
    tiny_model("llama").to(dtype).save_pretrained(tmp_path / "base")
    base = BaseCheckpoint(tmp_path / "base")
    merge(base, vectors_of(base, adapter), tmp_path / "merged", "a")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    assert found.dtype is dtype
    assert_same_weights(found, by_peft(tmp_path / "base", adapter), exact=True)


def test_several_adapters_are_pefts_merge_of_several(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapters = [
        save_adapter(tiny_model("llama"), tmp_path / name, seed=seed, **KINDS["default"])
        for seed, name in enumerate("ab")
    ]
    both = product([vectors_of(base, adapter) for adapter in adapters])
    merge(base, both, tmp_path / "merged", "a * b")

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_weights(found, by_peft(tmp_path / "base", *adapters), exact=False)


def test_shards_stay_shards(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    base = BaseCheckpoint(tmp_path / "base")
    adapter = save_adapter(model, tmp_path / "a")
    merge(base, vectors_of(base, adapter), tmp_path / "merged", "a")

    assert len(base.shards) > 2
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(base.shards)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_weights(found, by_peft(tmp_path / "base", adapter), exact=True)


def test_a_tied_head_is_untied_and_the_embeddings_stay(tmp_path: Path) -> None:
    """PEFT scales head and embeddings, since they are one tensor."""
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    factor = 1 + torch.rand(base.modules.sizes["lm_head"][1])
    merge(
        base, AdapterVectors({Target("lm_head", Side.OUTPUT): factor}), tmp_path / "merged", "head"
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    assert not found.config.tie_word_embeddings
    assert torch.equal(found.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    with torch.inference_mode():
        torch.testing.assert_close(found(IDS).logits, plain(IDS).logits * factor)


def test_files_whose_keys_lack_the_models_prefix_are_merged_too(tmp_path: Path) -> None:
    """GPT-2's own files on the hub have such keys."""
    saved(tmp_path / "base", "gpt2")
    adapter = save_adapter(tiny_model("gpt2"), tmp_path / "a", fan_in_fan_out=True)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()},
        file,
        metadata={"format": "pt"},
    )
    base = BaseCheckpoint(tmp_path / "base")
    merge(base, vectors_of(base, adapter), tmp_path / "merged", "a")

    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_same_weights(found, by_peft(tmp_path / "base", adapter), exact=True)


def test_the_tokenizer_comes_along_and_the_card_tells_the_recipe(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    adapter = save_adapter(tiny_model("llama"), tmp_path / "a")
    merge(base, vectors_of(base, adapter), tmp_path / "merged", "support * 0.5")

    assert (tmp_path / "merged" / "tokenizer.json").read_text() == "{}"
    assert "support * 0.5" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_all_files_have_the_mode_that_the_umask_gives(
    tmp_path: Path, mask: int, file: int, folder: int
) -> None:
    base = saved(tmp_path / "base")
    adapter = save_adapter(tiny_model("llama"), tmp_path / "adapter")
    before = os.umask(mask)
    try:
        merge(base, vectors_of(base, adapter), tmp_path / "out", "")
    finally:
        os.umask(before)

    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {file}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder


def test_a_weight_that_overflows_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    module = "model.layers.1.mlp.up_proj"
    huge = torch.full((base.modules.sizes[module][1],), 3e38)
    vectors = AdapterVectors({Target(module, Side.OUTPUT): huge * torch.tensor(1.0)})
    tensors = load_file(weights)
    tensors[f"{module}.weight"] *= 100
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CannotMerge, match=rf"weight of {module} is not finite"):
        merge(base, vectors, tmp_path / "merged", "huge")

    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_weight_that_the_files_do_not_name_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    adapter = save_adapter(tiny_model("llama"), tmp_path / "a")
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    fused = {key: t for key, t in tensors.items() if "k_proj" not in key}
    save_file(fused, weights, metadata={"format": "pt"})
    base = BaseCheckpoint(tmp_path / "base")
    with pytest.raises(CannotMerge, match="k_proj"):
        merge(base, vectors_of(base, adapter), tmp_path / "merged", "a")


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tmp_path / "base")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(StoreFull, match="merged model takes"):
        merge(base, AdapterVectors({}), tmp_path / "merged", "none")

    assert not (tmp_path / "merged").exists()


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    with pytest.raises(CannotMerge, match="exists already"):
        merge(base, AdapterVectors({}), tmp_path / "merged", "none")


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    with pytest.raises(CannotMerge, match=r"no folder .*gone"):
        merge(base, AdapterVectors({}), tmp_path / "gone" / "merged", "none")

    assert not (tmp_path / "gone").exists()


@pytest.mark.fault(
    "disk",
    "The disk fills while a merge writes",
    by="`RLIMIT_FSIZE`",
    promise="The merge fails and says so; nothing of it stays.",
)
def test_a_disk_that_fills_meanwhile_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(StoreFull, match="make room"):
            merge(base, AdapterVectors({}), tmp_path / "merged", "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_weights_that_were_damaged_since_are_told(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CannotMerge, match="damaged"):
        merge(base, AdapterVectors({}), tmp_path / "merged", "none")


def test_progress_is_told_from_0_to_1(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    told: list[float] = []
    merge(base, AdapterVectors({}), tmp_path / "merged", "none", told.append)

    assert 0 < told[0] < told[-1] == 1
    assert told == sorted(told)


def test_a_merge_can_be_ended_while_it_runs_and_leaves_nothing(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def tell(share: float) -> None:
        if share > 0.5:
            raise Enough

    base = saved(tmp_path / "base")
    with pytest.raises(Enough):
        merge(base, AdapterVectors({}), tmp_path / "merged", "none", tell)

    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("target", "size", "said"),
    [
        (Target("model.layers.9.mlp.down_proj", Side.INPUT), 64, "no linear layer model.layers.9"),
        (Target("model.norm", Side.OUTPUT), 32, "no linear layer model.norm"),
        (Target("model.layers.0.mlp.down_proj", Side.OUTPUT), 64, "output of .*down_proj has 32"),
        (Target("model.layers.0.mlp.down_proj", Side.INPUT), 32, "input of .*down_proj has 64"),
    ],
    ids=str,
)
def test_an_adapter_of_another_model_is_refused_with_the_modules_name(
    tmp_path: Path, target: Target, size: int, said: str
) -> None:
    base = saved(tmp_path / "base")
    with pytest.raises(CannotMerge, match=said):
        merge(base, AdapterVectors({target: torch.ones(size)}), tmp_path / "merged", "other")

    assert not (tmp_path / "merged").exists()
