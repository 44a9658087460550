"""The layers of `IA3Model`. They know adapters by name, and a notebook can train their vectors.

They compute what PEFT's `ia3.layer.Linear` and `ModulesToSaveWrapper` compute, in the same order
and dtypes. A server's layers are in `infuse.adapters.model.layer`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infuse.adapters.checkpoint.targets import Side
from infuse.adapters.errors import WrongCall
from infuse.adapters.model.layer import Wrapper
from infuse.adapters.model.saved_layer import SavedLayer

BASE_NAME = "__base__"
"""The base model in a list of adapter names, as in PEFT's mixed batches."""
_NO_ZERO = 1e-8
"""PEFT adds this to what it divides by when it unmerges."""


class Selection:
    """Which adapters the next forward uses. All layers of a model read the same one."""

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.rows: tuple[str, ...] | None = None
        """The adapter of each row of the batch; None where the active ones are all rows'."""
        self.tokens = 0
        """The number of tokens of a forward with `rows`: rows times their length."""


class Vectors(nn.Module):
    """Parameters by adapters' names. `nn.ParameterDict` refuses some names: `v1.5`, `keys`."""

    def names(self) -> Iterator[str]:
        return iter(self._parameters)

    def get(self, name: str) -> nn.Parameter | None:
        return self._parameters.get(name)

    def put(self, name: str, vector: nn.Parameter) -> None:
        self._parameters[name] = vector

    def drop(self, name: str) -> None:
        self._parameters.pop(name, None)


class TunedLayer(Wrapper):
    """A linear layer of the base model, and the vectors of the adapters that rescale it."""

    def __init__(self, base_layer: nn.Module, selection: Selection) -> None:
        super().__init__(base_layer)
        self.selection = selection
        self.ia3_l = Vectors()
        """`(out, 1)` or, on the input side, `(1, in)`: PEFT's, with its name in the state dict."""
        self.ia3_l_input = Vectors()
        """`(1, in)`: the input's vector of an adapter that has one for each side."""
        self.sides: dict[str, Side] = {}
        """Adapter -> the side of its vector in `ia3_l`."""
        self.merged_adapters: list[str] = []
        self._shared: nn.Parameter | None = None
        """The tied weight from before a merge, which its other module still uses."""

    def put(self, name: str, side: Side, vector: nn.Parameter) -> None:
        """Add an adapter's vector; where there are two, the output's comes first."""
        if name in self.sides:
            self.ia3_l_input.put(name, vector)
        else:
            self.ia3_l.put(name, vector)
            self.sides[name] = side

    def drop(self, name: str) -> None:
        self.ia3_l.drop(name)
        self.ia3_l_input.drop(name)
        self.sides.pop(name, None)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        both = (self.ia3_l.get(name), self.ia3_l_input.get(name))
        return [vector for vector in both if vector is not None]

    def vector(self, name: str, side: Side) -> nn.Parameter | None:
        """Return an adapter's vector of one side, None where it has none."""
        if self.sides.get(name) is side:
            return self.ia3_l.get(name)
        return self.ia3_l_input.get(name) if side is Side.INPUT else None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.selection.enabled or self.merged_adapters:
            y: torch.Tensor = self.base_layer(x, *args, **kwargs)
            return y
        y = self.base_layer(self._scaled(x, Side.INPUT), *args, **kwargs)
        return self._scaled(y, Side.OUTPUT)

    def _scaled(self, x: torch.Tensor, side: Side) -> torch.Tensor:
        if self.selection.rows is not None:
            return self._scaled_by_row(x, side, self.selection.rows)
        vectors = [self.vector(name, side) for name in self.selection.active]
        known = [vector for vector in vectors if vector is not None]
        if not known:
            return x
        factor = 1 * known[0].flatten()
        for vector in known[1:]:
            factor *= vector.flatten()
        wide = x.to(known[-1].dtype) if side is Side.INPUT else x
        return (wide * factor).to(x.dtype)

    def _scaled_by_row(self, x: torch.Tensor, side: Side, names: tuple[str, ...]) -> torch.Tensor:
        """Scale each row by its adapter. Beams and returned sequences of a row are neighbours."""
        vectors = [self.vector(name, side) for name in names]
        known = [vector.flatten() for vector in vectors if vector is not None]
        if not known:
            return x
        if x.dim() == 2 and len(x) != self.selection.tokens:
            raise WrongCall(
                "This model runs some layers on a part of the tokens, as experts do: adapter_names "
                "cannot say which; call set_adapter, for all rows"
            )
        widest = max((vector.dtype for vector in known), key=lambda dtype: dtype.itemsize)
        ones = torch.ones_like(known[0], dtype=widest)
        factor = torch.stack(
            [ones if vector is None else vector.flatten().to(widest) for vector in vectors]
        )
        rows = x.reshape(len(names), -1, x.shape[-1])
        return (rows * factor[:, None]).to(x.dtype).view(x.shape)

    # Merging, as in PEFT: one multiplication and one rounding for each adapter.

    def mergeable(self, names: Sequence[str]) -> list[str]:
        """Return those of the adapters that have a vector here and are not merged yet."""
        return [name for name in names if name in self.sides and name not in self.merged_adapters]

    def folded(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and bias with these adapters merged into them; change nothing."""
        weight: torch.Tensor = self._weight.detach()
        bias: torch.Tensor | None = self._bias
        for name in names:
            for side in Side:
                vector = self.vector(name, side)
                if vector is None:
                    continue
                weight = torch.mul(weight, self._oriented(vector)).to(weight.dtype)
                if side is Side.OUTPUT and bias is not None:
                    bias = torch.mul(bias.detach(), vector.detach().flatten()).to(bias.dtype)
        return weight, bias

    def merge(self, names: Sequence[str], *, tied: bool) -> None:
        """Merge adapters. `tied`: another module shares the weight, and must keep it."""
        weight, bias = self.folded(names)
        if tied:
            self._shared = self._weight
            self._base.weight = nn.Parameter(weight, requires_grad=False)
        else:
            self._weight.data = weight
        if bias is not None:
            self._base.bias.data = bias
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Divide by the merged vectors, the last one first; rounding errs as it does in PEFT."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for side in Side:
                vector = self.vector(name, side)
                if vector is None:
                    continue
                weight = self._weight.data
                self._weight.data = (weight / (self._oriented(vector) + _NO_ZERO)).to(weight.dtype)
                if side is Side.OUTPUT and self._bias is not None:
                    bias = self._bias.data
                    self._bias.data = (bias / (vector.detach().flatten() + _NO_ZERO)).to(bias.dtype)
        if self._shared is not None:
            self._base.weight = self._shared
            self._shared = None

    def _oriented(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.detach().T if isinstance(self._base, Conv1D) else vector.detach()

    @property
    def _base(self) -> Any:
        return self.base_layer

    @property
    def _weight(self) -> nn.Parameter:
        weight: nn.Parameter = self._base.weight
        return weight

    @property
    def _bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = self._base.bias
        return bias


class TunedSavedLayer(SavedLayer):
    """A module that some adapters replace by their own copy; each adapter has a number."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.modules_to_save = nn.ModuleDict()
        """The same copies by name, so that they move with the model and are in its state dict."""

    def put(self, number: int, name: str, module: nn.Module) -> None:
        self.copies[number] = module
        # add_module refuses names such as `v1.5`.
        self.modules_to_save._modules[name] = module

    def drop(self, slot: int) -> None:
        dropped = self.copies.get(slot)
        super().drop(slot)
        for name, module in list(self.modules_to_save.items()):
            if module is dropped:
                del self.modules_to_save._modules[name]
