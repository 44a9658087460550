"""An adapter's files become named vectors, and back, with every check that an upload must pass."""

import difflib
import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file

from infuse.adapters.checkpoint.adapter_files import folder_with_adapter, missing_files
from infuse.adapters.checkpoint.config import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE, IA3Config
from infuse.adapters.checkpoint.peft_configs import BOTH_SIDES, names_of_targets
from infuse.adapters.checkpoint.saved import (
    PREFIX,
    State,
    cannot_serve,
    embedding_fault,
    keys_of,
    read_state,
    saved_modules,
)
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target, resolve_targets
from infuse.adapters.checkpoint.weights import (
    FLOATS,
    SUFFIX,
    parse_weights,
    pieces_of,
    stage_weights,
)
from infuse.adapters.errors import CannotCombine, Fault, InvalidAdapter

_INPUT_SUFFIX = ".ia3_l_input"
_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's task types whose adapters bring a head; a model that generates text has none."""
_MAX_FAULTS = 50
_MAX_SHOWN = 200
"""Characters of a key that a fault shows."""


Float32s = numpy.ndarray[Any, numpy.dtype[numpy.float32]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The content of PEFT's two files: the config, and the tensors by PEFT's keys."""

    config: IA3Config
    tensors: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class AdapterVectors:
    """What an adapter does to a base model: a float32 `[size]` for each target.

    `saved`: the whole modules that it brings, in the base's dtype. `together`: all vectors in the
    order of their targets, where they lie so in memory.
    """

    vectors: Mapping[Target, torch.Tensor]
    saved: Mapping[str, State] = field(default_factory=dict)
    together: Float32s | None = field(default=None, repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """A digest of what the adapter does: equal for equal content, whatever names and files."""
        sha = hashlib.sha256()
        targets = sorted(self.vectors)
        sha.update("".join(f"{module}\0{side}\0" for module, side in targets).encode())
        if self.together is None:
            sha.update(b"".join(self.vectors[target].numpy().data for target in targets))
        else:
            sha.update(self.together.data)
        for module in sorted(self.saved):
            for key, tensor in sorted(self.saved[module].items()):
                sha.update(f"{module}\0{key}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
                sha.update(tensor.flatten().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @property
    def is_base(self) -> bool:
        """Whether it changes nothing."""
        return not self.vectors and not self.saved

    @property
    def saved_bytes(self) -> int:
        """Bytes of the whole modules."""
        return sum(tensor.nbytes for state in self.saved.values() for tensor in state.values())

    @cached_property
    def nbytes(self) -> int:
        return sum(vector.nbytes for vector in self.vectors.values()) + self.saved_bytes


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read what `save_pretrained` wrote. Raises InvalidAdapter with the faults of both files."""
    return _of_folder(folder, lambda weights: parse_weights(weights.read_bytes()))


def parse_checkpoint(files: Mapping[str, bytes]) -> Checkpoint:
    """`read_checkpoint` for the two files' bytes."""
    return _both(
        lambda: IA3Config.parse(files[CONFIG_FILE]), lambda: parse_weights(files[WEIGHTS_FILE])
    )


def staged_checkpoint(folder: Path) -> Checkpoint:
    """`read_checkpoint` for a check only: the tensors stay on the disk, and have shapes and dtypes
    but no values. See StagedTensors."""
    return _of_folder(folder, stage_weights)


def _of_folder(
    folder: Path, read_weights: Callable[[Path], Mapping[str, torch.Tensor]]
) -> Checkpoint:
    folder = folder_with_adapter(folder)
    missing = missing_files({file.name for file in folder.iterdir() if file.is_file()})

    def present(name: str) -> Path:
        if faults := [fault for fault in missing if fault.field == name]:
            raise InvalidAdapter(faults)
        return folder / name

    return _both(
        lambda: _read_config(present(CONFIG_FILE)), lambda: read_weights(present(WEIGHTS_FILE))
    )


def _both(
    read_config: Callable[[], IA3Config], read_weights: Callable[[], Mapping[str, torch.Tensor]]
) -> Checkpoint:
    faults: list[Fault] = []
    config, tensors = None, None
    try:
        config = read_config()
    except InvalidAdapter as error:
        faults += error.faults
    try:
        tensors = read_weights()
    except InvalidAdapter as error:
        faults += error.faults
    if config is None or tensors is None:
        raise InvalidAdapter(faults)
    return Checkpoint(config, tensors)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a folder that `PeftModel.from_pretrained` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(checkpoint.config.dump())
    tensors = {key: tensor.contiguous() for key, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def effective_vectors(checkpoint: Checkpoint, modules: BaseModules) -> AdapterVectors:
    """What the adapter does to this base model. Raises InvalidAdapter with all faults.

    PEFT keeps vectors in float32 whatever the model's dtype (`autocast_adapter_dtype`); so do we.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    targets = resolve_targets(config, modules)
    expected = keys_of_vectors(config, targets)
    names = saved_modules(config, modules, tensors.keys())
    known = {*expected, *(key for name in names for key in keys_of(name, modules).values())}
    faults = cannot_serve(names, targets, modules)
    if config.task_type in _HEADS:
        head = {key for key in tensors.keys() - known if not key.endswith(SUFFIX)}
        faults += [_head_fault(config, head)] if head else []
        known |= head
    faults += _unknown_keys(tensors, known)
    vectors, found = _vectors_of(expected, tensors, modules)
    faults += found
    saved = {}
    for name in names:
        saved[name], found = read_state(name, modules, tensors)
        faults += found
    if not faults and (fault := embedding_fault(saved, modules)) is not None:
        faults.append(fault)
    if len(faults) > _MAX_FAULTS:
        more = len(faults) - _MAX_FAULTS
        faults = [*faults[:_MAX_FAULTS], Fault(WEIGHTS_FILE, f"and {more} more faults like these")]
    if faults:
        raise InvalidAdapter(faults)
    return AdapterVectors(vectors, saved)


def _vectors_of(
    expected: Mapping[str, Target], tensors: Mapping[str, torch.Tensor], modules: BaseModules
) -> tuple[dict[Target, torch.Tensor], list[Fault]]:
    """Return the expected vectors, as views of one tensor, and their faults.

    The first request of an adapter waits for this, so as much as can be is done for all vectors at
    once.
    """
    faults = []
    usable: dict[str, Target] = {}
    for key, target in expected.items():
        if key not in tensors:
            fix = f"target_modules names {target.module}; save the adapter again with PEFT"
            faults.append(Fault(key, f"is missing in {WEIGHTS_FILE}", fix))
        elif fault := _tensor_fault(key, tensors[key], target, modules):
            faults.append(fault)
        else:
            usable[key] = target
    if not usable:
        return {}, faults
    # numpy computes on one core; torch would take several from the model.
    together = numpy.concatenate(
        [_flat(piece) for key in usable for piece in pieces_of(tensors, key)]
    )
    sizes = [tensors[key].numel() for key in usable]
    parts = torch.split(torch.from_numpy(together), sizes)
    vectors = dict(zip(usable.values(), parts, strict=True))
    # One pass: the sum is finite only if every value is.
    if not math.isfinite(together.sum()):
        for key, target in usable.items():
            if bad := int((~torch.isfinite(vectors[target])).sum()):
                problem = f"{bad} of {modules.size(target)} values are NaN or infinite"
                faults.append(Fault(key, problem, "train again with a lower learning rate"))
    return vectors, faults


def keys_of_vectors(config: IA3Config, targets: Sequence[Target]) -> dict[str, Target]:
    """Return the keys that a file must have for a config's targets. Raises InvalidAdapter."""
    keys = {f"{PREFIX}{target.module}{SUFFIX}": target for target in targets}
    outputs = {target.module for target in targets if target.side is Side.OUTPUT}
    return keys | {
        f"{PREFIX}{module}{_INPUT_SUFFIX}": Target(module, Side.INPUT)
        for module in outputs.intersection(_both_sides(config))
    }


def product(several: Sequence[AdapterVectors]) -> AdapterVectors:
    """Multiply the vectors of adapters that are active at once, as PEFT's
    `IA3Model.set_adapter([a, b])` does, in its order.

    One of them may bring whole modules; raises CannotCombine where another one changes them too.
    """
    check_product([(adapter.vectors.keys(), adapter.saved.keys()) for adapter in several])
    vectors: dict[Target, torch.Tensor] = {}
    for adapter in several:
        for target, vector in adapter.vectors.items():
            vectors[target] = vectors[target] * vector if target in vectors else vector
    saved = next((adapter.saved for adapter in several if adapter.saved), {})
    return AdapterVectors(vectors, saved)


def check_product(several: Iterable[tuple[Collection[Target], Collection[str]]]) -> None:
    """Raises CannotCombine unless adapters with these targets and whole modules can be active at
    once."""
    targets: list[Target] = []
    owned: list[str] = []
    for mine, modules in several:
        if owned and modules:
            raise CannotCombine(next(iter(modules)))
        targets += mine
        owned += modules
    for module in owned:
        if any(f"{target.module}.".startswith(f"{module}.") for target in targets):
            raise CannotCombine(module)


def checkpoint_of(
    vectors: AdapterVectors, base: str | None, task_type: str = "CAUSAL_LM"
) -> Checkpoint:
    """Return the files of vectors, as PEFT would save them where it can.

    PEFT has one side for a module. For a module that is rescaled on both sides, the input's vector
    has a key of our own, which we read back and PEFT ignores.
    """
    config = IA3Config.model_validate(
        {"task_type": task_type, "inference_mode": True, "base_model_name_or_path": base}
        | names_of_targets(vectors.vectors.keys())
    )
    return Checkpoint(config, tensors_of(vectors.vectors))


def tensors_of(vectors: Mapping[Target, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return vectors under PEFT's keys, in PEFT's shapes."""
    outputs = {target.module for target in vectors if target.side is Side.OUTPUT}
    tensors = {}
    for target, vector in vectors.items():
        if target.side is Side.OUTPUT:
            tensors[f"{PREFIX}{target.module}{SUFFIX}"] = vector[:, None]
        else:
            suffix = _INPUT_SUFFIX if target.module in outputs else SUFFIX
            tensors[f"{PREFIX}{target.module}{suffix}"] = vector[None]
    return tensors


def both_sides_warning(config: IA3Config) -> str | None:
    modules = _both_sides(config)
    if not modules:
        return None
    return (
        f"{len(modules)} modules are rescaled on both sides, which PEFT cannot load: it would read "
        "the outputs' vectors only"
    )


def _both_sides(config: IA3Config) -> list[str]:
    modules = (config.model_extra or {}).get(BOTH_SIDES, [])
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        fix = "leave it out: only this server writes it"
        raise InvalidAdapter([Fault(BOTH_SIDES, "is no list of module names", fix)])
    return modules


def base_mismatch_warning(config: IA3Config, served: str) -> str | None:
    """Return a warning where the adapter was trained on a base of another name."""
    trained = config.base_model_name_or_path
    if not trained or trained == served or Path(trained).name.lower() == Path(served).name.lower():
        return None
    return f"the adapter was trained on '{trained}', and this server runs '{served}'"


def _read_config(path: Path) -> IA3Config:
    with path.open("rb") as file:
        return IA3Config.parse(file.read(MAX_CONFIG_BYTES + 1))


def _unknown_keys(tensors: Mapping[str, torch.Tensor], expected: Set[str]) -> list[Fault]:
    unknown = sorted(tensors.keys() - expected)
    # An upload may have a million keys: only the first few are compared with ours.
    faults = [_unknown_key(key, expected) for key in unknown[:_MAX_FAULTS]]
    return faults + [Fault(key, "belongs to no module") for key in unknown[_MAX_FAULTS:]]


def _unknown_key(key: str, expected: Collection[str]) -> Fault:
    near = difflib.get_close_matches(key, expected, n=1) if len(key) <= _MAX_SHOWN else []
    if ".base_layer." in key:
        fix = "save the vectors alone: save_pretrained(folder, save_embedding_layers=False)"
    else:
        fix = f"did you mean {near[0]}?" if near else "each key is base_model.model.<module>.ia3_l"
    shown = key if len(key) <= _MAX_SHOWN else key[: _MAX_SHOWN - 3] + "..."
    return Fault(shown, "belongs to no module that the config targets in this base model", fix)


def _head_fault(config: IA3Config, keys: Collection[str]) -> Fault:
    first = min(keys).removeprefix(PREFIX)[:_MAX_SHOWN]
    problem = f"is {config.task_type}: its head ({first}) is not in a base that generates text"
    fix = (
        "train with task_type CAUSAL_LM; for the vectors alone, delete the head from "
        f"{WEIGHTS_FILE} and from modules_to_save"
    )
    return Fault("task_type", problem, fix)


def _flat(tensor: torch.Tensor) -> Float32s:
    return tensor.detach().to(torch.float32).numpy().ravel()


def _tensor_fault(
    key: str, tensor: torch.Tensor, target: Target, modules: BaseModules
) -> Fault | None:
    found, shape = tuple(tensor.shape), _shape(target, modules)
    other = Side.OUTPUT if target.side is Side.INPUT else Side.INPUT
    if found != shape and found == _shape(Target(target.module, other), modules):
        last = target.module.rpartition(".")[2]
        names = "names" if other is Side.OUTPUT else "does not name"
        problem = f"is a vector of the {other}, and feedforward_modules {names} the module"
        mend = "take it out of" if other is Side.OUTPUT else "add it to"
        return Fault(key, problem, f"'{last}': {mend} feedforward_modules in {CONFIG_FILE}")
    if found != shape:
        problem = f"has shape {found}, and the base model's layer needs {shape}"
        return Fault(key, problem, "train the adapter on the base model that is served here")
    if tensor.dtype not in FLOATS:
        return Fault(key, f"has dtype {tensor.dtype}", "save the vectors as float32")
    return None


def _shape(target: Target, modules: BaseModules) -> tuple[int, int]:
    size = modules.size(target)
    return (1, size) if target.side is Side.INPUT else (size, 1)
