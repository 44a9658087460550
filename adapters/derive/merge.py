"""Merge adapters into the base's weights: the result is a folder that plain transformers loads.

This is PEFT's `merge_and_unload(safe_merge=True)`, but from the checkpoint's files, a shard at a
time, so that the model is never whole in memory. It differs for a tied LM head: PEFT scales the
embeddings too, and this unties the head.
"""

import json
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.derive.base_checkpoint import INDEX, BaseCheckpoint
from infuse.adapters.errors import CannotMerge, StoreFull
from infuse.adapters.storage.folder import NO_ROOM
from infuse.adapters.storage.journal import sync

UNFINISHED = ".merging-"
"""The prefix of the folders that a crash may leave beside an output."""
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")
_SPARE = 1 << 20
"""Room for config, tokenizer and model card, in bytes."""


def merge(
    base: BaseCheckpoint,
    vectors: AdapterVectors,
    output: Path,
    recipe: str,
    progress: Callable[[float], object] = lambda _: None,
) -> None:
    """Write the merged model to `output`, which must not exist. It appears whole or not at all.

    `recipe` is written to the model card. `progress` is called with 0 to 1 after each tensor and
    each file of tensors, and may raise to end the merge. Raises CannotMerge (the output exists, or
    its folder does not; a target does not fit; a weight is missing, or not finite once merged) and
    StoreFull; as far as possible before anything is written.
    """
    if output.exists():
        raise CannotMerge(f"{output} exists already")
    if not output.parent.is_dir():
        raise CannotMerge(f"there is no folder {output.parent} to write {output.name} into")
    _check_targets(base, vectors)
    check_room(base, vectors, output.parent)
    with _naming_full_disks(output.parent):
        unfinished = output.parent / f"{UNFINISHED}{secrets.token_hex(8)}"
        unfinished.mkdir()
        try:
            _Merge(base, vectors, unfinished, progress).write()
            card = unfinished / "README.md"
            card.write_text(_card(base, recipe))
            for file in unfinished.iterdir():
                # As the umask has it; safetensors lets the owner alone read what it writes.
                file.chmod(stat.S_IMODE(card.stat().st_mode))
                sync(file)
            sync(unfinished)
            unfinished.rename(output)
            sync(output.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


def check_room(base: BaseCheckpoint, vectors: AdapterVectors, folder: Path) -> None:
    """Raises StoreFull where the disk of `folder` has no room for the merged model."""
    needed = base.nbytes + _SPARE
    if _unties(base, vectors):
        needed += sum(base.tensor(base.shared[name]).nbytes for name in _new_names(base))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StoreFull(
            f"The merged model takes {needed / 1e9:.1f} GB, and {folder} has "
            f"{free / 1e9:.1f} GB left."
        )


class _Merge:
    """Writes one merged model into `folder`."""

    def __init__(
        self,
        base: BaseCheckpoint,
        vectors: AdapterVectors,
        folder: Path,
        progress: Callable[[float], object],
    ) -> None:
        self._base = base
        self._vectors = vectors.vectors
        self._saved = {
            f"{module}.{key}": tensor
            for module, state in vectors.saved.items()
            for key, tensor in state.items()
        }
        """The tensors of the adapter's whole modules, by the parameters that they replace."""
        self._folder = folder
        self._progress = progress
        self._keys = sum(map(len, base.shards.values()))
        self._unties = _unties(base, vectors)
        self._merged: set[Target | str] = set()
        self._weight_map: dict[str, str] = {}
        self._nbytes = 0

    def write(self) -> None:
        for shard in self._base.shards:
            self._write_shard(shard)
        missing = [target.module for target in self._vectors.keys() - self._merged]
        missing += self._saved.keys() - self._merged
        if missing:
            names = ", ".join(sorted(missing)[:3])
            raise CannotMerge(
                f"the files name no weight for {names}: this family's checkpoint keeps it in "
                "another form, which merging does not know"
            )
        self._write_the_rest()

    def _write_shard(self, shard: Path) -> None:
        """Write one shard. Its tensors are freed when this returns, before the next shard."""
        tensors = self._merged_shard(shard)
        save_file(tensors, self._folder / shard.name, metadata={"format": "pt"})
        self._weight_map |= dict.fromkeys(tensors, shard.name)
        self._nbytes += sum(tensor.nbytes for tensor in tensors.values())
        self._progress(min(1.0, len(self._weight_map) / self._keys))

    def _merged_shard(self, shard: Path) -> dict[str, torch.Tensor]:
        base = self._base
        tensors = {}
        with safe_open(shard, framework="pt") as file:
            for key in base.shards[shard]:
                tensor = file.get_tensor(key)
                name = base.parameter(key)
                tensors[key] = tensor if name is None else self._adapted(name, tensor)
                if self._unties and name is not None and base.shared.get(name) == key:
                    tensors |= {
                        new: self._adapted(new, tensor.clone())
                        for new in _new_names(base)
                        if base.shared[new] == key
                    }
                self._progress(min(1.0, (len(self._weight_map) + len(tensors)) / self._keys))
        return tensors

    def _adapted(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the adapter's own tensor for a parameter, or the parameter multiplied by its
        vectors: in the wider type and rounded once, as PEFT's `ia3.layer.Linear.merge` does."""
        if name in self._saved:
            self._merged.add(name)
            return self._saved[name].to(tensor.dtype)
        module, _, kind = name.rpartition(".")
        result = tensor
        for side in Side:
            vector = self._vectors.get(Target(module, side))
            if vector is None or (kind == "bias" and side is Side.INPUT):
                continue
            if kind == "weight":
                self._merged.add(Target(module, side))
                rows = (side is Side.OUTPUT) != (module in self._base.transposed)
                vector = vector[:, None] if rows else vector[None]
            result = (result * vector).to(tensor.dtype)
            if not bool(torch.isfinite(result).all()):
                raise CannotMerge(f"the merged {kind} of {module} is not finite in {tensor.dtype}")
        return result

    def _write_the_rest(self) -> None:
        for file in self._base.folder.iterdir():
            if file.is_file() and not file.name.endswith(_NOT_COPIED):
                shutil.copyfile(file, self._folder / file.name)
        if len(self._base.shards) > 1:
            index = {"metadata": {"total_size": self._nbytes}, "weight_map": self._weight_map}
            (self._folder / INDEX).write_text(json.dumps(index, indent=2))
        if self._unties and not self._base.keeps_tied:
            path = self._folder / "config.json"
            config = json.loads(path.read_text()) | {"tie_word_embeddings": False}
            path.write_text(json.dumps(config, indent=2))


def _check_targets(base: BaseCheckpoint, vectors: AdapterVectors) -> None:
    for target, vector in vectors.vectors.items():
        if target.module not in base.modules.sizes:
            raise CannotMerge(f"{base.name} has no linear layer {target.module}")
        size = base.modules.size(target)
        if len(vector) != size:
            raise CannotMerge(
                f"the {target.side} of {target.module} has {size} features in {base.name}, and the "
                f"adapter's vector {len(vector)}: it was trained on another model"
            )
    for module, state in vectors.saved.items():
        known = base.modules.state_of(module) if module in base.modules.names else {}
        shapes = {key: tensor.shape for key, tensor in state.items()}
        if shapes != {key: tensor.shape for key, tensor in known.items()}:
            raise CannotMerge(
                f"the adapter's own {module} has another shape than that of {base.name}, as with "
                "tokens added to a vocabulary: those are not merged"
            )


def _unties(base: BaseCheckpoint, vectors: AdapterVectors) -> bool:
    """Whether the merge gives the tied head a weight of its own."""
    head = base.modules.output_embedding
    replaced = any(f"{module}.weight" in base.shared for module in vectors.saved)
    scaled = any(target.module == head for target in vectors.vectors)
    return bool(base.shared) and (scaled or replaced)


def _new_names(base: BaseCheckpoint) -> list[str]:
    """Return the parameters that need a tensor of their own once the head is untied."""
    return [name for name, key in base.shared.items() if base.parameter(key) != name]


@contextmanager
def _naming_full_disks(folder: Path) -> Iterator[None]:
    """Turn a disk that fills up into StoreFull, also where safetensors reports it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        said = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
        if number in NO_ROOM:
            raise StoreFull(f"The disk of {folder} is full; make room.") from error
        if isinstance(error, SafetensorError):
            raise CannotMerge(f"the base's weights are damaged: {error}") from error
        raise


def _card(base: BaseCheckpoint, recipe: str) -> str:
    lines = "\n".join(f"    {line}" for line in recipe.splitlines())
    return (
        f"---\nbase_model: {base.name}\nlibrary_name: transformers\ntags: [ia3, merged]\n"
        f"---\n# {base.name}, merged\n\n"
        f"IA3 adapters folded into the weights of {base.name}:\n\n{lines}\n\n"
        "The model needs no adapter: transformers loads it as it is.\n"
    )
