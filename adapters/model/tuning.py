"""The adapters that are attached to a base model by name, and which of them it uses."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    Checkpoint,
    check_product,
    tensors_of,
)
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.peft_configs import saved_form, settled
from infuse.adapters.checkpoint.saved import State, cannot_serve, keys_of, saved_modules
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target, resolve_targets
from infuse.adapters.errors import CombinedNotFinite, InvalidAdapter, WrongCall
from infuse.adapters.model.layer import Wrapping
from infuse.adapters.model.saved_layer import Layout, copy_of
from infuse.adapters.model.tuned_layer import Selection, TunedLayer, TunedSavedLayer

_INPUTS = ("input_ids", "inputs", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
"""The arguments of a forward or of `generate` whose first axis is the batch."""
_HALF = (torch.float16, torch.bfloat16)
_NO_COPY = 0
"""The number of the base, and of adapters without whole modules."""


@dataclass(frozen=True, slots=True)
class Attached:
    config: IA3Config
    number: int
    """Identifies the adapter in the layers around saved modules."""
    targets: tuple[Target, ...]
    saved: tuple[str, ...]


class Tuning:
    """Wraps a base model's layers and sets which adapters they use. `IA3Model` checks names.

    Every method computes first and then changes, so that one that raises has changed nothing.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = BaseModules.of(model)
        self.attached: dict[str, Attached] = {}
        self.selection = Selection()
        self._wrapping = Wrapping(model)
        self._layers: dict[str, TunedLayer] = {}
        self._saved: dict[str, TunedSavedLayer] = {}
        self._numbers = _NO_COPY

    @property
    def merged(self) -> list[str]:
        """The adapters that are merged into the base's weights, in at least one layer."""
        names = (name for layer in self._layers.values() for name in layer.merged_adapters)
        return list(dict.fromkeys(names))

    @property
    def wrapped(self) -> list[str]:
        return [name for name in self.modules.names if name in self._layers]

    def weight_of(self, module: str) -> torch.Tensor:
        layer: Any = self.model.get_submodule(module)
        weight: torch.Tensor = layer.weight
        return weight

    def _state_of(self, module: str) -> State:
        """Copy a module's parameters and buffers from the base, whatever layers are around them."""
        state = {}
        for key in self.modules.state_of(module):
            path, _, leaf = f"{module}.{key}".rpartition(".")
            state[key] = getattr(self.model.get_submodule(path), leaf).detach().clone()
        return state

    def vector(self, name: str, target: Target) -> torch.Tensor:
        """Return an adapter's vector, `[size]`."""
        vector = self._layers[target.module].vector(name, target.side)
        assert vector is not None
        return vector.detach().flatten()

    def copy(self, name: str, module: str) -> nn.Module:
        """Return an adapter's own copy of a module."""
        return self._saved[module].copies[self.attached[name].number]

    def attach(
        self,
        name: str,
        config: IA3Config,
        vectors: AdapterVectors,
        *,
        autocast: bool,
    ) -> None:
        """Add an adapter, frozen. Its vectors get the dtype of the weight that they rescale; with
        `autocast`, float32 where that is half precision (PEFT's `autocast_adapter_dtype`)."""
        config = settled(config, resolve_targets(config, self.modules), self.modules)
        parameters = {
            target: self._parameter(target, vector, autocast=autocast)
            for target, vector in vectors.vectors.items()
        }
        skeleton, device, dtype = self.modules.skeleton, self.model.device, self.model.dtype
        copies = {
            module: copy_of(skeleton.get_submodule(module), state, device).to(dtype=dtype)
            for module, state in vectors.saved.items()
        }
        self.unmerge("An adapter cannot be added while others are merged.")
        make = partial(TunedLayer, selection=self.selection)
        # The output's vector first, as `TunedLayer.put` needs it.
        for target in sorted(parameters, key=lambda target: target.side is Side.INPUT):
            if target.module not in self._layers:
                self._layers[target.module] = self._wrapping.wrap(target.module, make)
            self._layers[target.module].put(name, target.side, parameters[target])
        self._numbers += 1
        for module, copy in copies.items():
            if module not in self._saved:
                self._saved[module] = self._wrapping.wrap(module, TunedSavedLayer)
            self._saved[module].put(self._numbers, name, copy.train(self.model.training))
        self.attached[name] = Attached(config, self._numbers, tuple(parameters), tuple(copies))
        self._use_copies()

    def _parameter(self, target: Target, vector: torch.Tensor, *, autocast: bool) -> nn.Parameter:
        weight = self.weight_of(target.module)
        dtype = torch.float32 if autocast and weight.dtype in _HALF else weight.dtype
        shaped = vector[:, None] if target.side is Side.OUTPUT else vector[None]
        return nn.Parameter(shaped.to(weight.device, dtype, copy=True), requires_grad=False)

    def fresh(self, config: IA3Config) -> AdapterVectors:
        """Make an adapter that was not trained yet: ones, and copies of the modules that it saves.

        Raises InvalidAdapter.
        """
        targets = resolve_targets(config, self.modules)
        names = saved_modules(config, self.modules, ())
        if faults := cannot_serve(names, targets, self.modules):
            raise InvalidAdapter(faults)
        make = torch.ones if config.init_ia3_weights else torch.randn
        vectors = {target: make(self.modules.size(target)) for target in targets}
        return AdapterVectors(vectors, {name: self._state_of(name) for name in names})

    def drop(self, name: str) -> None:
        """Forget an adapter that is not active."""
        attached = self.attached.pop(name)
        for target in attached.targets:
            self._layers[target.module].drop(name)
        for module in attached.saved:
            self._saved[module].drop(attached.number)

    def activate(self, names: Sequence[str], *, trains: bool) -> None:
        """Make several adapters active together. With `trains` their parameters train; those of
        all other adapters do not. Raises CannotCombine."""
        several = [self.attached[name] for name in names if name in self.attached]
        check_product([(attached.targets, attached.saved) for attached in several])
        self.unmerge("Adapter cannot be set when the model is merged. Unmerging the model first.")
        self.select(names, trains=trains)

    def select(self, names: Sequence[str], *, trains: bool) -> None:
        """`activate` without its checks, and without unmerging."""
        self.selection.active = tuple(names)
        self._use_copies()
        for name in self.attached:
            self.require_grad(name, trains and name in names)

    def enable(self, enabled: bool) -> None:
        self.selection.enabled = enabled
        self._use_copies()
        for name in self.attached:
            self.require_grad(name, enabled and name in self.selection.active)

    def require_grad(self, name: str, trains: bool) -> None:
        """Set whether an adapter's vectors and modules train."""
        attached = self.attached[name]
        for module in {target.module for target in attached.targets}:
            for vector in self._layers[module].parameters_of(name):
                vector.requires_grad_(trains)
        for module in attached.saved:
            self.copy(name, module).requires_grad_(trains)

    @contextmanager
    def by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, row i of a batch uses adapter `names[i]`, if adapters are enabled."""
        hook = self.model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self.selection.rows = tuple(names)
        self._use_copies()
        try:
            yield
        finally:
            hook.remove()
            self.selection.rows = None
            self._use_copies()

    def _count_tokens(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = _inputs(args, kwargs)
        self.selection.tokens = given[0].shape[0] * given[0].shape[1] if given else 0

    def _use_copies(self) -> None:
        """Tell the layers around saved modules which adapters' copies the next forward uses."""
        names = self.selection.rows
        if not self.selection.enabled:
            names = ()
        elif names is None:
            owners = [name for name in self.selection.active if name in self.attached]
            names = tuple(name for name in owners if self.attached[name].saved)
        numbers = [self.attached[n].number if n in self.attached else _NO_COPY for n in names]
        with_copies = {attached.number for attached in self.attached.values() if attached.saved}
        layout = Layout(numbers, with_copies, self.model.device, flat=False)
        for layer in self._saved.values():
            layer.use(layout)

    def check_rows(
        self, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Raises WrongCall where a call with these inputs cannot have these adapters by row."""
        given = _inputs(args, kwargs)
        if given and len(given[0]) != len(names):
            raise WrongCall(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(given[0])} respectively."
            )
        if self.merged:
            raise WrongCall(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )

    # Files and weighted sums.

    def checkpoint(self, name: str) -> Checkpoint:
        """Return what `save_pretrained` writes of an adapter."""
        attached = self.attached[name]
        tensors = tensors_of({t: self.vector(name, t).cpu() for t in attached.targets})
        for module in attached.saved:
            keys = keys_of(module, self.modules)
            state = self.copy(name, module).state_dict()
            tensors |= {keys[key]: tensor.cpu().clone() for key, tensor in state.items()}
        return Checkpoint(saved_form(attached.config, self.model), tensors)

    def weighted(
        self, names: Sequence[str], weights: Sequence[float]
    ) -> dict[Target, torch.Tensor]:
        """Return the sums of vectors times weights, as in PEFT: in the layer's dtype, rounded after
        each addition; a missing vector counts as 0. Raises CombinedNotFinite."""
        vectors: dict[Target, torch.Tensor] = {}
        parts = [self.attached[name].targets for name in names]
        for target in dict.fromkeys(target for part in parts for target in part):
            like = self.weight_of(target.module)
            total = torch.zeros(self.modules.size(target), dtype=like.dtype, device=like.device)
            for name, targets, weight in zip(names, parts, weights, strict=True):
                if target in targets:
                    total += self.vector(name, target) * weight
            if not bool(torch.isfinite(total).all()):
                raise CombinedNotFinite(target.module)
            vectors[target] = total
        return vectors

    # Merging.

    def merge(self, names: Sequence[str], *, safe: bool) -> None:
        """Multiply the vectors of adapters that are not merged yet into the weights, one adapter
        after the other. With `safe`, raises WrongCall where a result is not finite."""
        per_layer = {name: layer.mergeable(names) for name, layer in self._layers.items()}
        if safe:
            for module, mine in per_layer.items():
                for tensor in self._layers[module].folded(mine):
                    if tensor is not None and not bool(torch.isfinite(tensor).all()):
                        raise WrongCall(
                            f"NaNs detected in the merged weights of {module}: one of "
                            f"{', '.join(mine)} seems to be broken; nothing was merged"
                        )
        for module, mine in per_layer.items():
            if mine:
                self._layers[module].merge(mine, tied=self._is_tied(module))

    def _is_tied(self, module: str) -> bool:
        """Whether the module is an LM head that shares the embeddings' weight. PEFT's merge scales
        the embeddings too; ours gives the head a weight of its own."""
        read = self.modules.input_embedding
        if module != self.modules.output_embedding or read is None:
            return False
        return self.weight_of(module) is self.weight_of(read)

    def unmerge(self, why: str) -> None:
        """Take all merged vectors out of the weights again, as exactly as PEFT; warn why."""
        if self.merged:
            warnings.warn(f"{why} Unmerge result can be inaccurate for (IA)^3.", stacklevel=4)
            for layer in self._layers.values():
                layer.unmerge()

    def undo(self) -> None:
        """Take all layers out of the base model, and forget all adapters."""
        self._wrapping.undo()
        head, read = self.modules.output_embedding, self.modules.input_embedding
        known = head is not None and read is not None
        if known and self.weight_of(str(head)) is not self.weight_of(str(read)):
            self.model.config.tie_word_embeddings = False
        self.attached.clear()
        self._layers.clear()
        self._saved.clear()
        self.selection.active = ()
        self.selection.enabled = True

    def leave_copies(self) -> None:
        """Take all layers out, but leave the active adapters' copies of modules in the model."""
        names = [name for name in self.selection.active if name in self.attached]
        copies = {m: self.copy(name, m) for name in names for m in self.attached[name].saved}
        self.undo()
        for module, copy in copies.items():
            parent, _, attribute = module.rpartition(".")
            setattr(self.model.get_submodule(parent), attribute, copy)


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    given = [*args[:1], *(kwargs.get(key) for key in _INPUTS)]
    return [each for each in given if each is not None]
