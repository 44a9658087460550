"""Every folder that PEFT writes loads, or the error says how to mend it."""

import copy
from pathlib import Path, PurePosixPath

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from infuse.adapters.checkpoint.adapter_files import adapter_folder
from infuse.adapters.checkpoint.checkpoint import (
    effective_vectors,
    read_checkpoint,
    staged_checkpoint,
)
from infuse.adapters.checkpoint.config import WEIGHTS_FILE
from infuse.adapters.checkpoint.layouts import Layouts
from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.model.model import IA3Model
from tests.adapters.oracle import logits, peft_logits
from tests.factories import save_adapter, tiny_llama
from tests.folders import CASES, Case, no_feedforward, pickled, state_dict_keys

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_folder_loads_or_its_answer_says_the_mend(case: Case, tmp_path: Path) -> None:
    base = tiny_llama()
    folder = case.make(copy.deepcopy(base), tmp_path / "x")
    model = IA3Model(base)
    if case.answer is None:
        model.load_adapter(folder, "a")
        assert model.adapter_names == ["a"]
        return
    with pytest.raises(InvalidAdapter) as refusal:
        model.load_adapter(folder, "a")
    field, problem, fix = case.answer
    fault = refusal.value.faults[0]
    assert fault.field.endswith(field)
    assert problem in fault.problem
    assert fix in fault.fix
    assert model.adapter_names == []


def test_a_sub_folder_is_peft_s_adapter_of_that_name(tmp_path: Path) -> None:
    base = tiny_llama()
    folder = CASES["sub-folder of a named adapter"].make(copy.deepcopy(base), tmp_path)
    model = IA3Model.from_pretrained(tiny_llama(), folder)
    assert torch.equal(logits(model, IDS), peft_logits(base, IDS, folder / "support"))


def test_keys_that_end_in_default_are_peft_s_too(tmp_path: Path) -> None:
    """PEFT loads them where the adapter is called `default`. The second is read by its layout."""
    folders = [state_dict_keys(tiny_llama(), tmp_path / str(number)) for number in range(2)]
    expected = logits(PeftModel.from_pretrained(tiny_llama(), folders[0]), IDS)
    model = IA3Model.from_pretrained(tiny_llama(), folders[0])
    assert torch.equal(logits(model, IDS), expected)
    layouts = Layouts(BaseModules.of(tiny_llama()))
    first, second = (
        layouts.read({file.name: file.read_bytes() for file in folder.iterdir()})
        for folder in folders
    )
    assert first.digest == second.digest


def test_the_mend_for_a_pickle_mends_it(tmp_path: Path) -> None:
    folder = pickled(tiny_llama(), tmp_path)
    PeftModel.from_pretrained(tiny_llama(), folder).save_pretrained(tmp_path / "new")
    model = IA3Model.from_pretrained(tiny_llama(), tmp_path / "new")
    assert torch.equal(logits(model, IDS), peft_logits(tiny_llama(), IDS, folder))


def test_the_mend_for_missing_feedforward_modules_mends_it(tmp_path: Path) -> None:
    folder = no_feedforward(tiny_llama(), tmp_path / "x")
    text = (folder / "adapter_config.json").read_text()
    mended = text.replace('"feedforward_modules": []', '"feedforward_modules": ["down_proj"]')
    (folder / "adapter_config.json").write_text(mended)
    expected = peft_logits(tiny_llama(), IDS, save_adapter(tiny_llama(), tmp_path / "y"))
    assert torch.equal(logits(IA3Model.from_pretrained(tiny_llama(), folder), IDS), expected)


def test_no_folder_is_said() -> None:
    with pytest.raises(InvalidAdapter, match=r"org/name: is no folder .* hf download"):
        IA3Model(tiny_llama()).load_adapter("org/name", "a")


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], None),
        ([WEIGHTS_FILE], None),
        (["adapter_config.json", "a/adapter_config.json"], "."),
        (["x/a/adapter_config.json", "x/adapter_config.json"], "x"),
        (["x/y/adapter_config.json"], "x/y"),
    ],
)
def test_the_topmost_config_is_the_adapter_s(files: list[str], found: str | None) -> None:
    assert adapter_folder(map(PurePosixPath, files)) == (found and PurePosixPath(found))


def test_a_tensor_that_a_file_holds_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path / "twice")
    tensors = load_file(folder / WEIGHTS_FILE)
    named = {f"{key}.default": value for key, value in tensors.items()}
    save_file(named | {key: value + 1 for key, value in tensors.items()}, folder / WEIGHTS_FILE)

    for read in (read_checkpoint, staged_checkpoint):
        # The file's order decides which of them comes last, and no order is promised.
        with pytest.raises(InvalidAdapter):
            effective_vectors(read(folder), BaseModules.of(tiny_llama()))


def test_a_saved_module_that_a_file_holds_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama(), tmp_path / "twice", modules_to_save=["norm"])
    tensors = load_file(folder / WEIGHTS_FILE)
    named = {f"{key}.default" if ".ia3_l" in key else key: value for key, value in tensors.items()}
    key = "base_model.model.model.norm"
    twice = {f"{key}.modules_to_save.default.weight": tensors[f"{key}.weight"] + 1}
    save_file(named | twice, folder / WEIGHTS_FILE)

    for read in (read_checkpoint, staged_checkpoint):
        with pytest.raises(InvalidAdapter, match="twice"):
            read(folder)
