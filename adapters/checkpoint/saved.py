"""Whole modules that an adapter brings (`modules_to_save`): which they are, and their tensors.

PEFT copies each module whose name ends in one of the config's (`peft.utils.other._set_trainable`),
and the adapter's rows go through the copy.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.config import WEIGHTS_FILE, IA3Config
from infuse.adapters.checkpoint.targets import BaseModules, Target
from infuse.adapters.checkpoint.weights import FLOATS, pieces_of
from infuse.adapters.errors import Fault

PREFIX = "base_model.model."

State = Mapping[str, torch.Tensor]
"""A module's parameters and persistent buffers, by their names in it."""


def saved_modules(config: IA3Config, modules: BaseModules, keys: Collection[str]) -> list[str]:
    """Return the modules of which the adapter has a copy. `keys`: the keys of its weights.

    PEFT also saves both embeddings, without being asked, where the vocabulary has grown.
    """
    ends = tuple(config.modules_to_save or ())
    embeddings = modules.embeddings
    return [
        name
        for name in modules.names
        if (name.endswith(ends) and modules.state_of(name))
        or (name in embeddings and f"{PREFIX}{name}.weight" in keys)
    ]


def keys_of(name: str, modules: BaseModules) -> dict[str, str]:
    """Return the keys of a module's state, each with its key in an adapter's weights."""
    return {key: f"{PREFIX}{name}.{key}" for key in modules.state_of(name)}


def cannot_serve(
    names: Sequence[str], targets: Collection[Target], modules: BaseModules
) -> list[Fault]:
    """Return a fault for each saved module that cannot run in a batch with other adapters."""
    faults = []
    for name in names:
        inside = [target.module for target in targets if f"{target.module}.".startswith(f"{name}.")]
        around = [other for other in names if name.startswith(f"{other}.")]
        problem = _not_by_token(modules.skeleton.get_submodule(name))
        if inside:
            problem = f"holds '{inside[0]}', which the adapter rescales too"
        elif around:
            problem = f"is a part of '{around[0]}', which is saved too"
        if problem:
            fix = "train without it in modules_to_save"
            faults.append(Fault("modules_to_save", f"'{name}' {problem}", fix))
    return faults


def _not_by_token(module: nn.Module) -> str | None:
    """Return why a module cannot be replaced for some tokens of a batch only; None if it can."""
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return "reads more than the token that it is computed for, as attention does"
    for part in module.modules():
        is_plain = isinstance(part, nn.Linear | Conv1D | nn.Embedding)
        if not is_plain and any(p.dim() > 1 for p in part.parameters(recurse=False)):
            return f"is of a kind ({type(part).__name__}) that cannot be replaced token by token"
    return None


def read_state(
    name: str, modules: BaseModules, tensors: Mapping[str, torch.Tensor]
) -> tuple[State, list[Fault]]:
    """Return a saved module's tensors in the base's dtype, as PEFT loads them, and their faults."""
    state, faults = {}, []
    for key, path in keys_of(name, modules).items():
        like = modules.state_of(name)[key]
        if path not in tensors:
            fix = f"modules_to_save covers {name}; save the adapter again with PEFT"
            faults.append(Fault(path, f"is missing in {WEIGHTS_FILE}", fix))
            continue
        tensor = tensors[path].detach()
        fault = _fault(path, tensors, like, resizable=name in modules.embeddings)
        if fault is None:
            state[key] = tensor.to(like.dtype).contiguous()
        else:
            faults.append(fault)
    return state, faults


def _fault(
    key: str, tensors: Mapping[str, torch.Tensor], like: torch.Tensor, resizable: bool
) -> Fault | None:
    tensor = tensors[key]
    found, needed = tuple(tensor.shape), tuple(like.shape)
    if not like.is_floating_point():
        return Fault(key, f"is {like.dtype} in the base", "serve a base that is not quantised here")
    if len(found) != len(needed) or found[resizable:] != needed[resizable:] or 0 in found:
        shown = str(needed).replace(str(needed[0]), "any", 1) if resizable else needed
        problem = f"has shape {found}, and the base model's module needs {shown}"
        return Fault(key, problem, "train the adapter on the base model that is served here")
    if tensor.dtype not in FLOATS:
        return Fault(key, f"has dtype {tensor.dtype}", "save the modules as floating-point numbers")
    bad = sum(
        int((~torch.isfinite(piece.to(like.dtype).float())).sum())
        for piece in pieces_of(tensors, key)
    )
    if bad:
        problem = f"{bad} of {tensor.numel()} values are NaN or infinite in {like.dtype}"
        return Fault(key, problem, "train again with a lower learning rate")
    return None


def embedding_fault(saved: Mapping[str, State], modules: BaseModules) -> Fault | None:
    """Return a fault where only the embeddings or only the head grew: transformers resizes both."""
    read, written = modules.input_embedding, modules.output_embedding
    if read is None or written is None:
        return None
    sizes = [rows_of(name, saved, modules) for name in (read, written)]
    if sizes == [rows_of(name, {}, modules) for name in (read, written)] or sizes[0] == sizes[1]:
        return None
    problem = f"writes {sizes[1]} tokens, and '{read}' reads {sizes[0]}"
    return Fault(written, problem, "resize both and save both, in modules_to_save")


def rows_of(name: str, saved: Mapping[str, State], modules: BaseModules) -> int:
    """Return how many tokens the adapter's embedding has, or the base's where it brings none."""
    state = saved.get(name) or modules.state_of(name)
    return len(state["weight"])
