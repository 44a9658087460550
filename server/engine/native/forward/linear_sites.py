"""Linear layers in traced forwards: they compute base layer, adapters' scales and fused gate."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from infuse.adapters.model.layer import IA3Layer, Scale, Wrapper
from infuse.server.engine.native.kernels.linear import KernelLinear, Scales
from infuse.server.engine.native.model.packing import PackedLinear, PackedSibling, Siblings

_LINEAR = (nn.Linear, Conv1D, PackedLinear, PackedSibling)


@dataclass(frozen=True)
class LinearSite:
    """The module attribute that holds a linear layer, which adapters may wrap later."""

    owner: nn.Module
    attribute: str

    @property
    def layer(self) -> nn.Module:
        """The layer as it is wrapped now, without the saved modules of adapters."""
        layer: nn.Module = getattr(self.owner, self.attribute)
        while isinstance(layer, Wrapper) and layer.outermost:
            layer = layer.base_layer
        return layer


def linear_sites(owner: nn.Module) -> Iterator[LinearSite]:
    """Find all linear layers below a module."""
    for attribute, child in owner.named_children():
        if isinstance(innermost(child), _LINEAR):
            yield LinearSite(owner, attribute)
        else:
            yield from linear_sites(child)


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


class TracedLinear:
    """One node of a traced graph: a linear layer, or several that are packed as one."""

    __name__ = "traced_linear"

    def __init__(self, sites: Sequence[LinearSite], *, owns_input: bool = False) -> None:
        """`owns_input`: no other node reads the input, so that it may be rescaled in place."""
        self._sites = sites
        self.owns_input = owns_input
        self._input_rescaled = False
        """Whether the node before has applied this layer's input scale."""
        self._reader: LinearSite | None = None
        """The layer whose input scale this node applies to its gated output."""
        self.gates = False
        """Whether the output is `silu(first) * second` of two layers."""

    @property
    def kernel(self) -> KernelLinear | None:
        """Our kernel, if it computes the layers."""
        layer = innermost(self._sites[0].layer)
        packed = layer.siblings if isinstance(layer, PackedSibling) else layer
        linear = packed.linear if isinstance(packed, (PackedLinear, Siblings)) else None
        return linear if isinstance(linear, KernelLinear) else None

    @property
    def columns(self) -> list[slice]:
        """The output columns of each layer; with a gate, the columns of its one output."""
        return self._outputs[:1] if self.gates else self._outputs

    @property
    def can_gate(self) -> bool:
        """Whether the kernel can compute `silu(first) * second` of two layers."""
        return len(self._sites) == 2 and self.kernel is not None and self.kernel.can_gate

    def gate(self, reader: "TracedLinear | None") -> None:
        """Compute the gate too, in a compiled forward. If `reader` is the only node that reads the
        output, apply its layer's input scale as well."""
        self.gates = True
        if reader is not None and reader.kernel is not None and len(reader._sites) == 1:
            [self._reader] = reader._sites
            reader._input_rescaled = True

    @cached_property
    def _outputs(self) -> list[slice]:
        layer = self._sites[0].layer
        siblings = siblings_of(layer)
        return [slice(0, width_of(innermost(layer)))] if siblings is None else siblings.columns

    def scales(self) -> Scales | None:
        """The scales that the kernel applies in the running batch. None: it cannot, because
        adapters rescale the input of only some of the packed layers."""
        return self._scales_of([site.layer for site in self._sites])

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
        """Compute the layer's output, or a sequence of all layers' outputs."""
        return self.bind()(x)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """Compute all layers' outputs as one new tensor."""
        outputs = self(x)
        return outputs if isinstance(outputs, torch.Tensor) else torch.cat(tuple(outputs), -1)

    def bind(self) -> Callable[[torch.Tensor], Any]:
        """A faster function for `__call__`, valid until adapters wrap or unwrap a layer."""
        layers = [site.layer for site in self._sites]
        siblings = siblings_of(layers[0])
        kernel = self.kernel
        if siblings is not None:
            return partial(self._together, layers, siblings)
        if kernel is not None:
            return partial(self._by_kernel, layers, kernel)
        return _alone(layers[0], self.owns_input)

    def _by_kernel(
        self, layers: Sequence[nn.Module], kernel: KernelLinear, x: torch.Tensor
    ) -> torch.Tensor:
        scales = self._scales_of(layers)
        assert scales is not None, "the kernel can rescale a single layer on both sides"
        return kernel(x, scales)

    def _together(
        self, layers: Sequence[nn.Module], siblings: Siblings, x: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        scales = self._scales_of(layers)
        if scales is None:
            return [layer(x) for layer in layers]
        if isinstance(siblings.linear, KernelLinear):
            return siblings.linear(x, scales).split_with_sizes(siblings.widths, -1)
        y = siblings.linear(x)
        for columns, scale in scales.outputs:
            scale.scale_(y[..., columns])
        return y.split_with_sizes(siblings.widths, -1)


def _alone(layer: nn.Module, owns_input: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    base = layer.base_layer if isinstance(layer, IA3Layer) else layer
    inner = base.linear if isinstance(base, PackedLinear) else base
    if not isinstance(layer, IA3Layer):
        return inner
    return partial(layer.around, inner, in_place=owns_input)


def _input_scale(layer: nn.Module) -> Scale | None:
    return layer.input_scale if isinstance(layer, IA3Layer) else None


def _output_scale(layer: nn.Module) -> Scale | None:
    return layer.output_scale if isinstance(layer, IA3Layer) else None
