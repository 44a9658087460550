"""Linear layers by our own kernel in C++, which also applies each token's IA3 vectors.

For a batch of decoding rows, oneDNN reaches half of the speed of two cores, and the vectors need
more operators. No library has a GEMM whose rows are rescaled by vectors of their own.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F

from infuse.adapters.model.layer import Scale
from infuse.server.engine.native.kernels.build import NUMBERS, load_kernel

_SOURCE = Path(__file__).with_suffix(".cpp")

_INPUT_BYTES = 4
"""The kernel reads this much of a token at a time: two numbers in bfloat16."""

Linear = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer whose weight and bias are packed: `[..., inputs]` to `[..., outputs]`."""
Pack = Callable[[torch.Tensor, torch.Tensor | None], Linear]
"""Packs a weight `[outputs, inputs]` and a bias."""
Rescaled = tuple[slice, Scale]
"""Output columns of a linear layer, and the scale that is applied to them."""


class _Weight(ctypes.Structure):
    """The struct `Weight` of `linear.cpp`."""

    _fields_ = (
        ("panels", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("numbers", ctypes.c_int64),
    )


class _Rescaling(ctypes.Structure):
    """The struct `Rescaling` of `linear.cpp`."""

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
    """The scales that a linear layer applies, each by token."""

    input: Scale | None = None
    outputs: tuple[Rescaled, ...] = ()
    gated: Scale | None = None
    """Applied to the output of the gate; see `KernelLinear.__call__`."""


_UNSCALED = Scales()


class _Scales(ctypes.Structure):
    """The struct `Scales` of `linear.cpp`, which is written only when the scales change."""

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
    """The struct `LinearCall` of `operators.cpp`."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("weight", ctypes.POINTER(_Weight)),
        ("scales", ctypes.POINTER(_Scales)),
    )


class KernelLinear:
    """A linear layer by our kernel: `(x * input) @ weight.T + bias`, some columns rescaled.

    Sums are float32. In bfloat16 the kernel rounds where PEFT's layers round. A token's result
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
        self.bias = None if bias is None else bias.detach().float().contiguous()
        bias_at = None if self.bias is None else self.bias.data_ptr()
        self.weight = _Weight(self._panels.data_ptr(), bias_at, self.outputs, self.inputs)
        self.function = library.linear
        self._scales = _Scales()

    @property
    def can_gate(self) -> bool:
        """Whether the columns are two equal halves of whole panels."""
        return self.outputs % (2 * self.panel_width) == 0

    def __call__(
        self, x: torch.Tensor, scales: Scales = _UNSCALED, *, gate: bool = False
    ) -> torch.Tensor:
        """Compute the layer. With `gate`, return `silu(first half) * second half` of its columns;
        see `can_gate`."""
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


class LinearCall:
    """One use of a layer, with its own scales, for `torch.ops.infuse.kernel_linear`."""

    def __init__(self, linear: KernelLinear) -> None:
        self._linear = linear
        self._scales = _Scales()
        function = ctypes.cast(linear.function, ctypes.c_void_p)
        pointers = ctypes.pointer(linear.weight), ctypes.pointer(self._scales)
        self._call = _Call(function, *pointers)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._call)

    def rescale(self, by: Scales) -> None:
        self._scales.set(by, self._linear.weight)


def _array(rescalings: Sequence[_Rescaling]) -> "ctypes.Array[_Rescaling] | None":
    return (_Rescaling * len(rescalings))(*rescalings) if rescalings else None


def linear_kernels(cache: Path) -> Mapping[torch.dtype, Pack]:
    """For each dtype with a kernel, the function that packs a layer for it. Raises what
    `load_kernel` does."""
    return {dtype: linear_kernel(flags, cache) for dtype, flags in NUMBERS.items()}


def linear_kernel(flags: Sequence[str], cache: Path) -> Pack:
    """The kernel that these compiler flags give. Raises what `load_kernel` does."""
    library = load_kernel(_SOURCE, flags, cache)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.linear.argtypes = [
        *(ctypes.POINTER(_Weight), pointer, number, pointer),
        *(ctypes.POINTER(_Scales), ctypes.c_int, ctypes.c_int),
    ]
    library.linear.restype = None
    library.panel_width.restype = number
    return partial(KernelLinear, library)
