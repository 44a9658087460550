"""The folder of a base model: which parameters its keys name, and what is refused."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.derive.base_checkpoint import BaseCheckpoint
from infuse.adapters.errors import CannotMerge
from tests.families import FAMILIES, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def configure(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_and_parameters_are_the_loaded_models(tmp_path: Path, family: str) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "base")
    base = BaseCheckpoint(tmp_path / "base")
    names = {base.parameter(key) for keys in base.shards.values() for key in keys}

    assert base.modules == BaseModules.of(model)
    for module in base.modules.sizes:
        assert f"{module}.weight" in names | base.shared.keys()


def test_experts_are_fused_in_the_model_and_so_no_parameter_of_their_own(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path / "base")
    base = BaseCheckpoint(tmp_path / "base")
    keys = load_file(tmp_path / "base" / "model.safetensors")
    expert = next(key for key in keys if ".w2." in key)

    assert base.parameter(expert) is None


def test_a_checkpoint_is_called_as_its_folder_or_as_it_is_told(folder: Path) -> None:
    assert BaseCheckpoint(folder).name == "base"
    assert BaseCheckpoint(folder, "org/model").name == "org/model"


def test_quantised_weights_are_refused_with_the_way_out(folder: Path) -> None:
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(CannotMerge, match=r"quantised \(bitsandbytes\).*unquantised"):
        BaseCheckpoint(folder)


def test_weights_that_are_no_safetensors_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CannotMerge, match="safetensors only"):
        BaseCheckpoint(folder)


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    last = max((tmp_path / "base").glob("*.safetensors"))
    last.unlink()
    with pytest.raises(CannotMerge, match=last.name):
        BaseCheckpoint(tmp_path / "base")


def test_damaged_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CannotMerge, match=r"model\.safetensors is damaged"):
        BaseCheckpoint(folder)


@pytest.mark.parametrize(
    ("config", "said"),
    [("{", "no model"), ("{}", "no model"), ('{"model_type": "vit"}', "vit generates no text")],
)
def test_a_config_of_no_language_model_is_refused(folder: Path, config: str, said: str) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(CannotMerge, match=said):
        BaseCheckpoint(folder)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CannotMerge, match="no model that transformers knows"):
        BaseCheckpoint(tmp_path)
