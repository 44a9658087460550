"""Whole modules that an adapter brings: read and checked, and run by name, as PEFT does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import WEIGHTS_FILE, AdapterVectors
from infuse.adapters.derive.combine import Recipe, combine
from infuse.adapters.errors import CannotCombine, InvalidAdapter
from infuse.adapters.model.model import IA3Model
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.residency import Residency
from tests.adapters.oracle import logits, peft_logits, vectors_of
from tests.factories import save_adapter, tiny_llama, tiny_model

HEAD = "base_model.model.lm_head.weight"
EMBEDDINGS = "base_model.model.model.embed_tokens.weight"
PLAIN = {"target_modules": ["k_proj"], "feedforward_modules": []}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]])


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    return folder


def faults_of(folder: Path, base: PreTrainedModel | None = None) -> dict[str, str]:
    with pytest.raises(InvalidAdapter) as refusal:
        vectors_of(folder, base or tiny_llama())
    return {fault.field: f"{fault.problem} {fault.fix}" for fault in refusal.value.faults}


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("llama", ["lm_head", "embed_tokens", "norm"]),
        ("llama", ["mlp"]),
        ("gpt2", ["lm_head", "wte", "wpe", "ln_f", "mlp"]),
        ("opt", ["lm_head", "embed_tokens", "final_layer_norm", "fc1"]),
        ("qwen3", ["lm_head", "q_norm", "k_norm"]),
    ],
)
def test_each_row_by_name_is_pefts(family: str, saved: list[str], tmp_path: Path) -> None:
    base = tiny_model(family)
    targets = {"target_modules": ["c_attn" if family == "gpt2" else "k_proj"]}
    config: dict[str, Any] = {**targets, "feedforward_modules": []}
    whole = save_adapter(base, tmp_path / "whole", modules_to_save=saved, **config)
    plain = save_adapter(base, tmp_path / "plain", seed=2, **config)
    model = IA3Model(tiny_model(family))
    model.load_adapter(whole, "whole")
    model.load_adapter(plain, "plain")

    found = logits(model, IDS, adapter_names=["whole", "__base__", "plain"])

    for row, folders in enumerate([[whole], [], [plain]]):
        expected = peft_logits(base, IDS[row : row + 1], *folders)
        assert torch.allclose(found[row : row + 1], expected, atol=2e-4)
    model.set_adapter("whole")
    assert torch.allclose(logits(model, IDS), peft_logits(base, IDS, whole), atol=2e-4)


def test_a_product_may_have_one_adapter_with_whole_modules(tmp_path: Path) -> None:
    base = tiny_llama()
    whole = save_adapter(base, tmp_path / "whole", modules_to_save=["lm_head"], **PLAIN)
    plain = save_adapter(base, tmp_path / "plain", seed=2)
    head = {"target_modules": ["lm_head"], "feedforward_modules": []}
    on_head = save_adapter(base, tmp_path / "on head", seed=3, **head)
    model = IA3Model(tiny_llama())
    for folder in (whole, plain, on_head):
        model.load_adapter(folder, folder.name)

    model.set_adapter(["whole", "plain"])

    assert torch.allclose(logits(model, IDS), peft_logits(base, IDS, whole, plain), atol=1e-4)
    with pytest.raises(CannotCombine):
        model.set_adapter(["whole", "on head"])


def test_other_mixtures_with_whole_modules_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path, modules_to_save=["norm"], **PLAIN)
    whole = vectors_of(folder, tiny_llama())
    with pytest.raises(CannotCombine):
        combine([whole], Recipe(method="linear", weights=(0.5,)))


def test_a_deleted_adapter_leaves_the_others_modules_in_place(tmp_path: Path) -> None:
    base = tiny_llama()
    folders = [
        save_adapter(base, tmp_path / name, seed=seed, modules_to_save=["lm_head", "norm"], **PLAIN)
        for seed, name in enumerate("ab", start=1)
    ]
    model = IA3Model(tiny_llama())
    for folder in folders:
        model.load_adapter(folder, folder.name)
    model.set_adapter("a")
    model.delete_adapter("b")
    assert torch.allclose(logits(model, IDS), peft_logits(base, IDS, folders[0]), atol=1e-4)


def test_the_base_is_whole_again_once_unloaded(tmp_path: Path) -> None:
    base = tiny_llama()
    before = [type(module) for module in base.modules()]
    model = IA3Model(base)
    inner = {"target_modules": ["down_proj"], "feedforward_modules": []}
    model.load_adapter(save_adapter(base, tmp_path / "1", **inner), "1")
    outer = save_adapter(tiny_llama(), tmp_path / "2", modules_to_save=["mlp", "lm_head"], **PLAIN)
    model.load_adapter(outer, "2")
    beside = {"target_modules": ["up_proj", "lm_head"], "feedforward_modules": []}
    model.load_adapter(save_adapter(tiny_llama(), tmp_path / "3", **beside), "3")
    model.set_adapter("2")
    assert [type(module) for module in model.unload().modules()] == before
    assert torch.equal(logits(base, IDS), logits(tiny_llama(), IDS))


def test_adapters_with_other_modules_do_other_things(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path, modules_to_save=["norm"], **PLAIN)
    one = vectors_of(folder, tiny_llama())
    norm = "base_model.model.model.norm.weight"
    other = vectors_of(changed(folder, lambda t: t[norm].mul_(2)), tiny_llama())
    assert one.digest != other.digest
    assert one.digest != AdapterVectors(one.vectors).digest
    assert one.saved_bytes == 5 * 32 * 4


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ("self_attn", "'model.layers.0.self_attn' reads more than the token"),
        ("layers.1", "'model.layers.1' reads more than the token"),
        ("lp", "holds 'model.layers.0.mlp.down_proj', which the adapter rescales too"),
    ],
)
def test_a_module_that_cannot_be_replaced_row_by_row_is_refused_with_the_reason(
    saved: str, problem: str, tmp_path: Path
) -> None:
    config = {"target_modules": ["down_proj"], "feedforward_modules": []}
    folder = save_adapter(tiny_llama(), tmp_path, **config)
    text = (folder / "adapter_config.json").read_text()
    text = text.replace('"modules_to_save": null', f'"modules_to_save": ["{saved}"]')
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InvalidAdapter) as refusal:
        vectors_of(folder, tiny_llama())
    assert any(problem in str(fault) for fault in refusal.value.faults)


def test_every_fault_of_saved_modules_stands_in_one_answer(tmp_path: Path) -> None:
    saved = ["lm_head", "norm", "down_proj"]
    folder = save_adapter(tiny_llama(), tmp_path, modules_to_save=saved, **PLAIN)
    prefix = "base_model.model.model.layers.0."

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD][0, 0] = float("nan")
        tensors[f"{prefix}mlp.down_proj.weight"] = torch.ones(3, 64)
        del tensors[f"{prefix}input_layernorm.weight"]
        tensors["base_model.model.model.norm.weight"] = torch.ones(32, dtype=torch.int64)
        tensors["base_model.model.model.norm.bias"] = torch.ones(32)

    faults = faults_of(changed(folder, spoil))
    assert "1 of 4096 values are NaN or infinite" in faults[HEAD]
    assert "has shape (3, 64)" in faults[f"{prefix}mlp.down_proj.weight"]
    assert "is missing" in faults[f"{prefix}input_layernorm.weight"]
    assert "has dtype torch.int64" in faults["base_model.model.model.norm.weight"]
    assert "belongs to no module" in faults["base_model.model.model.norm.bias"]
    assert len(faults) == 5


def test_values_too_large_for_the_bases_dtype_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path, modules_to_save=["lm_head"], **PLAIN)
    changed(folder, lambda tensors: tensors[HEAD].mul_(1e6))
    assert "infinite in torch.float16" in faults_of(folder, tiny_llama().half())[HEAD]


def test_embeddings_and_head_grow_together(tmp_path: Path) -> None:
    larger = tiny_llama()
    larger.resize_token_embeddings(130, mean_resizing=False)
    both = ["lm_head", "embed_tokens"]
    folder = save_adapter(larger, tmp_path / "both", modules_to_save=both, **PLAIN)
    assert len(vectors_of(folder, tiny_llama()).saved["lm_head"]["weight"]) == 130
    for name, alone in (("lm_head", HEAD), ("embed_tokens", EMBEDDINGS)):
        one = save_adapter(larger, tmp_path / name, modules_to_save=[name], **PLAIN)
        [fault] = faults_of(one).values()
        assert "resize both and save both" in fault, alone


def test_embeddings_that_peft_saved_unasked_are_taken(tmp_path: Path) -> None:
    """PEFT saves both once the vocabulary has grown, with nothing in modules_to_save."""
    folder = save_adapter(tiny_llama(), tmp_path, **PLAIN)
    new = {HEAD: torch.randn(130, 32), EMBEDDINGS: torch.randn(130, 32)}
    vectors = vectors_of(changed(folder, lambda tensors: tensors.update(new)), tiny_llama())
    assert torch.equal(vectors.saved["lm_head"]["weight"], new[HEAD])
    assert torch.equal(vectors.saved["model.embed_tokens"]["weight"], new[EMBEDDINGS])


class Kept:
    """Two adapters with a head each, and room for one of them."""

    def __init__(self, root: Path) -> None:
        base = tiny_llama()
        folders = [
            save_adapter(base, root / str(n), seed=n, modules_to_save=["lm_head"], **PLAIN)
            for n in (1, 2)
        ]
        self.vectors = [vectors_of(folder, base) for folder in folders]
        room = self.vectors[0].saved_bytes
        self.residency = Residency(IA3Slots(tiny_llama(), 4, max_saved_bytes=room))
        self.leases = [self.residency.lease(str(n), str(n), v) for n, v in enumerate(self.vectors)]


def test_modules_wait_for_those_that_a_row_uses(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    one, two = kept.leases
    assert kept.residency.pin(one) is not None
    assert kept.residency.pin(two) is None
    kept.residency.unpin(one)
    assert kept.residency.pin(two) is not None
    assert kept.residency.stats().saved_bytes == kept.vectors[1].saved_bytes
    assert kept.residency.stats().resident == 1


def test_kept_modules_give_way_to_a_row_and_to_nothing_else(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    one, two = kept.vectors
    kept.residency.keep("0", one)
    kept.residency.keep("1", two)
    kept.residency.settle()
    assert kept.residency.stats().swaps == 1
    lease = kept.leases[1]
    assert kept.residency.pin(lease) is not None
    kept.residency.settle()
    assert kept.residency.stats().swaps == 2
    kept.residency.unpin(lease)
    assert kept.residency.pin(kept.leases[0]) is not None


def test_evicted_modules_leave_the_device_at_once_or_at_the_next_step(tmp_path: Path) -> None:
    base = tiny_llama()
    folder = save_adapter(base, tmp_path, modules_to_save=["lm_head"], **PLAIN)
    model = IA3Slots(tiny_llama(), 4)
    residency = Residency(model)
    with residency.lease("key", "label", vectors_of(folder, base)) as lease:
        slot = residency.pin(lease)
        residency.unpin(lease)
        residency.retire("key")
        assert slot is not None
        assert model.has_copies([slot])
    residency.settle()
    assert not model.has_copies([slot])
    assert residency.stats().saved_bytes == 0
