"""Read a base model's folder: its files, and its modules without their weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import CannotMerge

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class BaseCheckpoint:
    """A base model's folder. It is only read, and no weight stays in memory."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """`name`: the model's name, if not the folder's.

        Raises CannotMerge where the weights are quantised, damaged or not safetensors.
        """
        self.folder = folder
        self.name = name or folder.name
        config = _read_config(folder)
        skeleton = _skeleton(config)
        self.modules = BaseModules.of(skeleton)
        self.transposed = {n for n, m in skeleton.named_modules() if isinstance(m, Conv1D)}
        conversions = get_model_conversion_mapping(skeleton)
        self._renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        self._converters = [each for each in conversions if isinstance(each, WeightConverter)]
        self._prefix = skeleton.base_model_prefix
        self._state = skeleton.state_dict()
        self.shards = _shards(folder)
        """The keys in each file of weights."""
        self.head = f"{self.modules.output_embedding}.weight"
        self.shared = self._shared_with_head(skeleton)
        """The head's parameter and those tied to it, each with its key in the files; empty where
        none is tied to the head."""

    @property
    def keeps_tied(self) -> bool:
        """Whether the family ties its head whatever its config says (T5, MT5). There transformers
        does not tie tensors that differ in the files."""
        untied = AutoConfig.for_model(self.modules.model_type, tie_word_embeddings=False)
        return bool(untied.tie_word_embeddings)

    @property
    def nbytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    def parameter(self, key: str) -> str | None:
        """Return the parameter of a key in the files, renamed as transformers does when it loads;
        None where the key is no parameter, or only a part of one."""
        name, converter = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._state
        )
        return name if converter is None and name in self._state else None

    def tensor(self, key: str) -> torch.Tensor:
        """Return a tensor of the files; its values are read when they are used."""
        shard = next(shard for shard, keys in self.shards.items() if key in keys)
        with safe_open(shard, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    def _shared_with_head(self, skeleton: PreTrainedModel) -> Mapping[str, str]:
        tied = skeleton.all_tied_weights_keys
        source = tied.get(self.head, self.head)
        names = {source} | {target for target, its_source in tied.items() if its_source == source}
        keys = {self.parameter(key): key for keys in self.shards.values() for key in keys}
        found = {name: keys[name] for name in names if name in keys}
        if len(names) == 1 or not found:
            return {}
        if self.head in found and len(found) > 1:
            # As in transformers, tensors that differ are not tied, whatever the config says.
            head = self.tensor(found[self.head])
            other = next(key for name, key in found.items() if name != self.head)
            if not torch.equal(head, self.tensor(other)):
                return {}
        any_key = next(iter(found.values()))
        return {name: found.get(name, any_key) for name in sorted(names)}


def _read_config(folder: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CannotMerge(f"{folder} holds no model that transformers knows: {reason}") from error
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
        raise CannotMerge(
            f"the weights in {folder} are quantised ({settings.get('quant_method', 'unknown')}), "
            "and a vector folded into them would be rounded away: merge into the unquantised "
            "weights of this model"
        )
    return config


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise CannotMerge(
            f"the model type {config.model_type} generates no text: {str(error).splitlines()[0]}"
        ) from error
    return model


def _shards(folder: Path) -> dict[Path, list[str]]:
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted({folder / str(file) for file in weight_map.values()})
    else:
        files = [folder / SINGLE]
    shards = {}
    for file in files:
        if not file.is_file():
            raise CannotMerge(f"{folder} holds no {file.name}: merging reads safetensors only")
        try:
            with safe_open(file, framework="pt") as opened:
                shards[file] = list(opened.keys())
        except SafetensorError as error:
            raise CannotMerge(f"{file} is damaged: {error}") from error
    return shards
