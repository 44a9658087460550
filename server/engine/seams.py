"""Where a traced forward meets linear layers: what they make of their input, adapters and all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.layer import IA3Layer, Wrapper
from server.engine.kernels.product import KernelProduct, panel_width_of
from server.engine.packing import PackedLinear, PackedSibling, Siblings

_LINEAR = (nn.Linear, Conv1D, PackedLinear, PackedSibling)


@dataclass(frozen=True)
class Seam:
    """Where the model has a linear layer. Adapters wrap it later."""

    owner: nn.Module
    attribute: str

    @property
    def layer(self) -> nn.Module:
        """As it stands now, without the modules that some adapters bring instead."""
        layer: nn.Module = getattr(self.owner, self.attribute)
        while isinstance(layer, Wrapper) and layer.outermost:
            layer = layer.base_layer
        return layer


def seams_of(owner: nn.Module) -> Iterator[Seam]:
    for attribute, child in owner.named_children():
        if isinstance(innermost(child), _LINEAR):
            yield Seam(owner, attribute)
        else:
            yield from seams_of(child)


def innermost(module: nn.Module) -> nn.Module:
    while isinstance(module, Wrapper):
        module = module.base_layer
    return module


def siblings_of(layer: nn.Module) -> Siblings | None:
    linear = innermost(layer)
    return linear.siblings if isinstance(linear, PackedSibling) else None


class Product:
    """What one linear layer, or several that are packed as one, make of their input."""

    __name__ = "product"

    def __init__(self, seams: Sequence[Seam], *, owns_input: bool = False) -> None:
        """`owns_input`: nobody else reads it."""
        self._seams = seams
        self._owns_input = owns_input
        self._input_rescaled = False
        """It comes with this layer's vectors in it."""
        self._gates = False
        self._reader: Seam | None = None

    @property
    def can_gate(self) -> bool:
        """Whether its kernel makes `silu(first) * second` of two layers."""
        siblings = siblings_of(self._seams[0].layer)
        product = None if siblings is None else siblings.product
        return len(self._seams) == 2 and isinstance(product, KernelProduct) and product.can_gate

    def gate(self, reader: "Product | None") -> None:
        """Make that from now on; for a `reader`, the only one, with its layer's vectors in it."""
        self._gates = True
        if reader is not None and panel_width_of(reader._seams[0].layer) is not None:
            [self._reader] = reader._seams
            reader._input_rescaled = True

    def __call__(self, x: torch.Tensor) -> Any:
        return self.bind()(x)

    def bind(self) -> Callable[[torch.Tensor], Any]:
        """Itself, for as long as no adapter wraps another layer."""
        layers = [seam.layer for seam in self._seams]
        if len(layers) == 1:
            return _alone(layers[0], self._owns_input, self._input_rescaled)
        siblings = siblings_of(layers[0])
        assert siblings is not None
        rescaled = [(n, each) for n, each in enumerate(layers) if isinstance(each, IA3Layer)]
        reader = None if self._reader is None else self._reader.layer
        reader = reader if isinstance(reader, IA3Layer) else None
        return partial(_together, layers, rescaled, siblings, self._gates, reader)


def _alone(
    layer: nn.Module, owns_input: bool, input_rescaled: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    base = layer.base_layer if isinstance(layer, IA3Layer) else layer
    inner = base.product if isinstance(base, PackedLinear) else base
    if not isinstance(layer, IA3Layer):
        return inner
    if isinstance(inner, KernelProduct):
        return partial(_by_kernel, layer, inner, input_rescaled)
    return partial(layer.around, inner, in_place=owns_input)


def _by_kernel(
    layer: IA3Layer, product: KernelProduct, input_rescaled: bool, x: torch.Tensor
) -> torch.Tensor:
    output = layer.output_scale
    taken = () if output is None else ((slice(0, product.outputs), output),)
    return product(x, None if input_rescaled else layer.input_scale, taken)


def _together(
    layers: Sequence[nn.Module],
    rescaled: Sequence[tuple[int, IA3Layer]],
    siblings: Siblings,
    gates: bool,
    reader: IA3Layer | None,
    x: torch.Tensor,
) -> Sequence[torch.Tensor] | torch.Tensor:
    """`reader`: whose vectors what is gated gets."""
    parts: Sequence[torch.Tensor]
    scales = [(n, each.output_scale) for n, each in rescaled if each.output_scale is not None]
    gated = None if reader is None else reader.input_scale
    if any(layer.input_scale is not None for _, layer in rescaled):
        parts = [layer(x) for layer in layers]
    elif isinstance(siblings.product, KernelProduct):
        taken = [(siblings.columns[n], scale) for n, scale in scales]
        product = siblings.product(x, taken=taken, gate=gates, gated=gated)
        return product if gates else product.split_with_sizes(siblings.widths, -1)
    else:
        parts = siblings.product(x).split_with_sizes(siblings.widths, -1)
        for n, scale in scales:
            scale.scale_(parts[n])
    if not gates:
        return parts
    y = F.silu(parts[0]) * parts[1]
    return y if gated is None else gated.scale_(y)
