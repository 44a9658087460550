"""Products of linear layers as a kernel in C++, with each token's IA3 vectors in them.

For a batch of decoding rows oneDNN reaches half of what two cores can compute, and the vectors took
operators of their own. No library multiplies a batch whose rows have vectors of their
own.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F

from adapters.model.layer import Scale
from server.engine.native.kernels.build import NUMBERS, load_kernel

_SOURCE = Path(__file__).with_suffix(".cpp")

_INPUT_BYTES = 4
"""The kernel reads so much of a token at a time: two numbers in bfloat16."""

Product = Callable[[torch.Tensor], torch.Tensor]
"""`[..., inputs]` to `[..., outputs]`: a linear layer's weight and bias, in their own layout."""
Pack = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""From a weight `[outputs, inputs]` and a bias."""
Rescaled = tuple[slice, Scale]
"""Columns of a product, and how they are rescaled."""


class _Weight(ctypes.Structure):
    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("numbers", ctypes.c_int64),
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


class Scales(NamedTuple):
    """What rescales a product: scales by token."""

    input: Scale | None = None
    outputs: tuple[Rescaled, ...] = ()
    gated: Scale | None = None
    """Rescales what the gate lets through."""


_UNSCALED = Scales()


class _Scales(ctypes.Structure):
    _fields_ = (
        ("input", ctypes.POINTER(_Rescaling)),
        ("outputs", ctypes.POINTER(_Rescaling)),
        ("count", ctypes.c_int64),
        ("gated", ctypes.POINTER(_Rescaling)),
    )
    _set = _UNSCALED

    def set(self, to: Scales, weight: _Weight) -> None:
        if to == self._set:
            return
        whole, half = slice(0, weight.numbers), slice(0, weight.outputs // 2)
        self.input = _array([] if to.input is None else [_Rescaling.of(whole, to.input)])
        self.outputs = _array([_Rescaling.of(*each) for each in to.outputs])
        self.count = len(to.outputs)
        self.gated = _array([] if to.gated is None else [_Rescaling.of(half, to.gated)])
        self._set = to


class _Call(ctypes.Structure):
    """`operators.cpp` reads it."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("weight", ctypes.POINTER(_Weight)),
        ("scales", ctypes.POINTER(_Scales)),
    )


class KernelProduct:
    """`(x * input) @ weight.T + bias`, of which some columns are rescaled.

    In bfloat16 it is rounded where PEFT's layers round, and sums are float32. What a token gets
    depends neither on its batch nor on the number of threads.
    """

    def __init__(
        self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self.outputs, self.inputs = weight.shape
        width = int(library.panel_width())
        together = _INPUT_BYTES // weight.itemsize
        padded = F.pad(weight, (0, -self.inputs % together, 0, -self.outputs % width))
        self.panel_width = width
        inputs = padded.view(-1, width, padded.shape[1] // together, together)
        self._panels = inputs.transpose(1, 2).contiguous()
        self._bias = None if bias is None else bias.detach().float().contiguous()
        bias_at = None if self._bias is None else self._bias.data_ptr()
        self.weight = _Weight(self._panels.data_ptr(), bias_at, self.outputs, self.inputs)
        self.function = library.product
        self._scales = _Scales()

    @property
    def can_gate(self) -> bool:
        """Whether it has panels for two equal halves."""
        return self.outputs % (2 * self.panel_width) == 0

    def __call__(
        self, x: torch.Tensor, scales: Scales = _UNSCALED, *, gate: bool = False
    ) -> torch.Tensor:
        """`gate`: `silu(first half) * second half` of the product, by columns; see `can_gate`."""
        assert x.dtype == self._panels.dtype
        self._scales.set(scales, self.weight)
        if not x.is_contiguous():
            x = x.contiguous()
        y = x.new_empty(*x.shape[:-1], self.outputs // 2 if gate else self.outputs)
        self.function(
            *(self.weight, x.data_ptr(), x.numel() // self.inputs, y.data_ptr()),
            *(self._scales, gate, torch.get_num_threads()),
        )
        return y


class ProductCall:
    """A product with scales of its own, for `torch.ops.infuse.product`."""

    def __init__(self, product: KernelProduct) -> None:
        self._product = product
        self._scales = _Scales()
        function = ctypes.cast(product.function, ctypes.c_void_p)
        pointers = ctypes.pointer(product.weight), ctypes.pointer(self._scales)
        self._call = _Call(function, *pointers)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._call)

    def rescale(self, by: Scales) -> None:
        self._scales.set(by, self._product.weight)


def _array(rescalings: Sequence[_Rescaling]) -> "ctypes.Array[_Rescaling] | None":
    return (_Rescaling * len(rescalings))(*rescalings) if rescalings else None


def product_kernels(cache: Path) -> Mapping[torch.dtype, Pack]:
    """What packs a layer for a kernel. Raises what `load_kernel` does."""
    return {dtype: partial(KernelProduct, _load(flags, cache)) for dtype, flags in NUMBERS.items()}


def _load(flags: Sequence[str], cache: Path) -> ctypes.CDLL:
    library = load_kernel(_SOURCE, flags, cache)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.product.argtypes = [
        *(ctypes.POINTER(_Weight), pointer, number, pointer),
        *(ctypes.POINTER(_Scales), ctypes.c_int, ctypes.c_int),
    ]
    library.product.restype = None
    library.panel_width.restype = number
    return library
