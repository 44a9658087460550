"""Where a traced forward meets linear layers: what they make of their input, adapters and all."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.model.layer import IA3Layer, Scale, Wrapper
from server.engine.native.kernels.product import KernelProduct, Scales
from server.engine.native.model.packing import PackedLinear, PackedSibling, Siblings

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


def width_of(linear: nn.Module) -> int:
    width: int = linear.nf if isinstance(linear, Conv1D) else linear.out_features  # type: ignore[assignment]
    return width


def siblings_of(layer: nn.Module) -> Siblings | None:
    linear = innermost(layer)
    return linear.siblings if isinstance(linear, PackedSibling) else None


class Product:
    """What one linear layer, or several that are packed as one, make of their input."""

    __name__ = "product"

    def __init__(self, seams: Sequence[Seam], *, owns_input: bool = False) -> None:
        """`owns_input`: nobody else reads it."""
        self._seams = seams
        self.owns_input = owns_input
        self._input_rescaled = False
        """It comes with this layer's vectors in it."""
        self._reader: Seam | None = None
        self.gates = False

    @property
    def kernel(self) -> KernelProduct | None:
        """What computes it, if that is a kernel of ours."""
        layer = innermost(self._seams[0].layer)
        packed = layer.siblings if isinstance(layer, PackedSibling) else layer
        product = packed.product if isinstance(packed, (PackedLinear, Siblings)) else None
        return product if isinstance(product, KernelProduct) else None

    @property
    def columns(self) -> list[slice]:
        """Of each layer's outputs, side by side; or of what a gate gives, which is as wide as the
        first."""
        return self._outputs[:1] if self.gates else self._outputs

    @property
    def can_gate(self) -> bool:
        """Whether its kernel makes `silu(first) * second` of two layers."""
        return len(self._seams) == 2 and self.kernel is not None and self.kernel.can_gate

    def gate(self, reader: "Product | None") -> None:
        """Make that in a compiled forward; for a `reader`, the only one, with its layer's vectors
        in it."""
        self.gates = True
        if reader is not None and reader.kernel is not None and len(reader._seams) == 1:
            [self._reader] = reader._seams
            reader._input_rescaled = True

    @cached_property
    def _outputs(self) -> list[slice]:
        layer = self._seams[0].layer
        siblings = siblings_of(layer)
        return [slice(0, width_of(innermost(layer)))] if siblings is None else siblings.columns

    def scales(self) -> Scales | None:
        """What its kernel is to rescale in this batch; None where it cannot: adapters rescale the
        input of some of the layers only."""
        return self._scales_of([seam.layer for seam in self._seams])

    def _scales_of(self, layers: Sequence[nn.Module]) -> Scales | None:
        inputs = [_input_scale(layer) for layer in layers]
        given = None
        if siblings_of(layers[0]) is None:
            given = None if self._input_rescaled else inputs[0]
        elif any(scale is not None for scale in inputs):
            return None
        scaled = zip(self._outputs, map(_output_scale, layers), strict=True)
        taken = tuple((columns, scale) for columns, scale in scaled if scale is not None)
        gated = None if self._reader is None else _input_scale(self._reader.layer)
        return Scales(given, taken, gated)

    def __call__(self, x: torch.Tensor) -> Any:
        """The layer's output, or those of all layers."""
        return self.bind()(x)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The same as one tensor that nobody else has."""
        made = self(x)
        return made if isinstance(made, torch.Tensor) else torch.cat(tuple(made), -1)

    def bind(self) -> Callable[[torch.Tensor], Any]:
        """Itself, for as long as no adapter wraps another layer."""
        layers = [seam.layer for seam in self._seams]
        siblings = siblings_of(layers[0])
        kernel = self.kernel
        if siblings is not None:
            return partial(self._together, layers, siblings)
        if kernel is not None:
            return partial(self._by_kernel, layers, kernel)
        return _alone(layers[0], self.owns_input)

    def _by_kernel(
        self, layers: Sequence[nn.Module], kernel: KernelProduct, x: torch.Tensor
    ) -> torch.Tensor:
        scales = self._scales_of(layers)
        assert scales is not None, "a layer that is alone can be rescaled on both sides"
        return kernel(x, scales)

    def _together(
        self, layers: Sequence[nn.Module], siblings: Siblings, x: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        scales = self._scales_of(layers)
        if scales is None:
            return [layer(x) for layer in layers]
        if isinstance(siblings.product, KernelProduct):
            return siblings.product(x, scales).split_with_sizes(siblings.widths, -1)
        y = siblings.product(x)
        for columns, scale in scales.outputs:
            scale.scale_(y[..., columns])
        return y.split_with_sizes(siblings.widths, -1)


def _alone(layer: nn.Module, owns_input: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    base = layer.base_layer if isinstance(layer, IA3Layer) else layer
    inner = base.product if isinstance(base, PackedLinear) else base
    if not isinstance(layer, IA3Layer):
        return inner
    return partial(layer.around, inner, in_place=owns_input)


def _input_scale(layer: nn.Module) -> Scale | None:
    return layer.input_scale if isinstance(layer, IA3Layer) else None


def _output_scale(layer: nn.Module) -> Scale | None:
    return layer.output_scale if isinstance(layer, IA3Layer) else None
