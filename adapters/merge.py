"""Fold adapters into the base weights: a folder that plain transformers loads, with no adapter.

PEFT's `merge_and_unload(safe_merge=True)`, but from the checkpoint's files, a shard at a time, so
that no model is ever whole in memory; and right where PEFT is not: a tied LM head is untied, where
PEFT's merge scales the embeddings with it.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.checkpoint import AdapterVectors
from adapters.errors import CannotMerge, StoreFull
from adapters.targets import BaseModules, Side, Target

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")


class BaseCheckpoint:
    """A base model's folder: its files, and its modules without their weights."""

    def __init__(self, folder: Path) -> None:
        """Raises CannotMerge where the weights are no safetensors."""
        self.folder = folder
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder)
            skeleton = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        self.modules = BaseModules.of(skeleton)
        self.embedding = _name_of_embedding(skeleton)
        self.tied = bool(skeleton.config.get_text_config().tie_word_embeddings)
        self.transposed = {n for n, m in skeleton.named_modules() if isinstance(m, Conv1D)}
        self._prefix = f"{skeleton.base_model_prefix}."
        self._names = set(dict(skeleton.named_parameters(remove_duplicate=False)))
        if (folder / _INDEX).is_file():
            weight_map = json.loads((folder / _INDEX).read_text())["weight_map"]
            self.shards = sorted({folder / str(file) for file in weight_map.values()})
        elif (folder / _SINGLE).is_file():
            self.shards = [folder / _SINGLE]
        else:
            raise CannotMerge(f"{folder} holds no {_SINGLE}: merging reads safetensors only")

    @property
    def nbytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)

    def parameter(self, key: str) -> str | None:
        """The model's name for a key of the files; older files leave the model's prefix out."""
        for name in (key, self._prefix + key):
            if name in self._names:
                return name
        return None


def merge(base: BaseCheckpoint, vectors: AdapterVectors, output: Path, recipe: str) -> None:
    """Write the merged model to `output`, which must not exist. It appears whole or not at all.

    `recipe` is told in the model card. Raises CannotMerge (the output exists, a weight is not found
    or not finite once merged) and StoreFull before anything is written where room is missing.
    """
    for module in vectors.saved:
        raise CannotMerge(f"the adapter brings its own copy of {module}; only vectors are merged")
    if output.exists():
        raise CannotMerge(f"{output} exists already")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < base.nbytes * 1.05:
        raise StoreFull(
            f"The merged model takes {base.nbytes / 1e9:.1f} GB, and {output.parent} has "
            f"{free / 1e9:.1f} GB left."
        )
    unfinished = Path(tempfile.mkdtemp(prefix=".merging-", dir=output.parent))
    try:
        _write(base, vectors, unfinished)
        (unfinished / "README.md").write_text(_card(base, recipe))
        unfinished.chmod(0o755)
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write(base: BaseCheckpoint, vectors: AdapterVectors, folder: Path) -> None:
    merged: set[Target] = set()
    weight_map: dict[str, str] = {}
    for shard in base.shards:
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file, not a mapping
                tensors[key] = _merged(base, vectors, key, file.get_tensor(key), merged)
                if base.tied and base.parameter(key) == base.embedding:
                    tensors |= _untied_head(base, vectors, file.get_tensor(key), merged)
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    missing = vectors.vectors.keys() - merged
    if missing:
        names = ", ".join(sorted(target.module for target in missing)[:3])
        raise CannotMerge(
            f"the files name no weight for {names}: this family's checkpoint keeps it in another "
            "form, which merging does not know"
        )
    for file in base.folder.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    if len(base.shards) > 1:
        index = {"metadata": {"total_size": base.nbytes}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    if _head(base) in {target.module for target in vectors.vectors} and base.tied:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


def _merged(
    base: BaseCheckpoint,
    vectors: AdapterVectors,
    key: str,
    tensor: torch.Tensor,
    merged: set[Target],
) -> torch.Tensor:
    """A tensor of the files with what the adapter does to its module."""
    name = base.parameter(key)
    if name is None:
        return tensor
    module, _, kind = name.rpartition(".")
    if base.tied and module == _head(base):
        # A tied head that is in the file all the same: it is written with the embeddings.
        return tensor
    for side in Side:
        vector = vectors.vectors.get(Target(module, side))
        if vector is None or (kind == "bias" and side is Side.INPUT):
            continue
        if kind == "weight":
            merged.add(Target(module, side))
            rows = (side is Side.OUTPUT) != (module in base.transposed)
            vector = vector[:, None] if rows else vector[None]
        tensor = _scaled(tensor, vector, module)
    return tensor


def _untied_head(
    base: BaseCheckpoint, vectors: AdapterVectors, tensor: torch.Tensor, merged: set[Target]
) -> dict[str, torch.Tensor]:
    head = _head(base)
    result = tensor
    for side in Side:
        target = Target(head, side)
        if target in vectors.vectors:
            merged.add(target)
            vector = vectors.vectors[target]
            result = _scaled(result, vector[:, None] if side is Side.OUTPUT else vector[None], head)
    return {} if result is tensor else {f"{head}.weight": result}


def _scaled(tensor: torch.Tensor, vector: torch.Tensor, module: str) -> torch.Tensor:
    """PEFT's `ia3.layer.Linear.merge`: the product in the wider type, rounded once."""
    result = (tensor * vector).to(tensor.dtype)
    if not bool(torch.isfinite(result).all()):
        raise CannotMerge(f"the merged weight of {module} is not finite in {tensor.dtype}")
    return result


def _head(base: BaseCheckpoint) -> str:
    return base.modules.output_embedding or ""


def _name_of_embedding(skeleton: PreTrainedModel) -> str:
    embedding = skeleton.get_input_embeddings()
    names = (name for name, module in skeleton.named_modules() if module is embedding)
    return f"{next(names)}.weight"


def _card(base: BaseCheckpoint, recipe: str) -> str:
    return (
        f"---\nbase_model: {base.folder.name}\nlibrary_name: transformers\ntags: [ia3, merged]\n"
        f"---\n# {base.folder.name}, merged\n\n"
        f"IA3 adapters folded into the weights of {base.folder.name}:\n\n    {recipe}\n\n"
        "The model needs no adapter: transformers loads it as it is.\n"
    )
