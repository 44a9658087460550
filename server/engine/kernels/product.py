"""Products of linear layers as a kernel in C++, with each token's IA3 vectors in them.

For a batch of decoding rows oneDNN reaches half of what two cores can compute in float32, and the
vectors took operators of their own. No library multiplies a batch whose rows have vectors of their
own.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from adapters.layer import Scale
from server.engine.kernels.build import load_kernel
from server.engine.packing import Pack, PackedLinear

_SOURCE = Path(__file__).with_suffix(".cpp")

Rescaled = tuple[slice, Scale]
"""Columns of a product, and how they are rescaled."""


class _Weight(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
    )


class _Rescaling(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("entries", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("stop", ctypes.c_int64),
    )

    @classmethod
    def of(cls, columns: slice, scale: Scale) -> Self:
        assert scale.by_token is not None, "the bank is to give scales by token"
        panels, entries, _ = scale.by_token
        assert panels.is_contiguous()
        where = (panels.data_ptr(), panels.shape[1], entries.data_ptr())
        return cls(*where, columns.start, columns.stop)


class _Scales(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.POINTER(_Rescaling)),
        ("outputs", ctypes.POINTER(_Rescaling)),
        ("count", ctypes.c_int64),
        ("gated", ctypes.POINTER(_Rescaling)),
    )


class KernelProduct:
    """`(x * input) @ weight.T + bias`, of which some columns are rescaled, in float32.

    What a token gets depends neither on its batch nor on the number of threads.
    """

    def __init__(
        self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.outputs, self.inputs = weight.shape
        width = int(library.panel_width())
        padded = F.pad(weight, (0, 0, 0, -self.outputs % width))
        self.panel_width = width
        self._panels = padded.view(-1, width, self.inputs).transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.detach().contiguous()
        bias_at = None if self._bias is None else self._bias.data_ptr()
        self._weight = _Weight(self._panels.data_ptr(), bias_at, self.outputs, self.inputs)
        self._function = library.product
        self._scales: tuple[Scale | None, tuple[Rescaled, ...], Scale | None]
        self._rescalings: _Scales
        self._set_scales(None, (), None)

    @property
    def can_gate(self) -> bool:
        """Whether it has panels for two equal halves."""
        return self.outputs % (2 * self.panel_width) == 0

    def __call__(
        self,
        x: torch.Tensor,
        given: Scale | None = None,
        taken: Sequence[Rescaled] = (),
        gate: bool = False,
        gated: Scale | None = None,
    ) -> torch.Tensor:
        """`given` rescales the input, `taken` parts of the product: scales by token.

        `gate`: `silu(first half) * second half` of the product, by columns, rescaled by `gated`;
        see `can_gate`.
        """
        scales = (given, tuple(taken), gated)
        if scales != self._scales:
            self._set_scales(*scales)
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs // 2 if gate else self.outputs)
        self._function(
            *(self._weight, x.data_ptr(), x.numel() // self.inputs, y.data_ptr()),
            *(self._rescalings, gate, torch.get_num_threads()),
        )
        return y

    def _set_scales(
        self, given: Scale | None, taken: tuple[Rescaled, ...], gated: Scale | None
    ) -> None:
        inputs = [] if given is None else [_Rescaling.of(slice(0, self.inputs), given)]
        outputs = [_Rescaling.of(*each) for each in taken]
        behind = [] if gated is None else [_Rescaling.of(slice(0, self.outputs // 2), gated)]
        self._rescalings = _Scales(_array(inputs), _array(outputs), len(outputs), _array(behind))
        self._scales = (given, taken, gated)


def _array(rescalings: Sequence[_Rescaling]) -> "ctypes.Array[_Rescaling] | None":
    return (_Rescaling * len(rescalings))(*rescalings) if rescalings else None


def product_kernels(cache: Path) -> Mapping[torch.dtype, Pack]:
    """What packs a layer for a kernel. Raises what `load_kernel` does."""
    library = load_kernel(_SOURCE, (), cache)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.product.argtypes = [
        *(ctypes.POINTER(_Weight), pointer, number, pointer),
        *(ctypes.POINTER(_Scales), ctypes.c_int, ctypes.c_int),
    ]
    library.product.restype = None
    library.panel_width.restype = number
    return {torch.float32: partial(KernelProduct, library)}


def panel_width_of(model: nn.Module) -> int | None:
    """Of a packed model's products by our kernel; None where it has none."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and isinstance(module.product, KernelProduct):
            return module.product.panel_width
    return None
