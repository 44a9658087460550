"""Attention by our own kernel in C++, for servers that may compile.

With one token a row, torch's batched matmuls are so small that they read keys and values at half of
the memory's bandwidth. Prompts they compute one by one, at a third of the processor's speed.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from infuse.server.engine.native.attention import LayerAttention, LayerMemory, LayerShape
from infuse.server.engine.native.kernels.build import NUMBERS, load_kernel

_SOURCE = Path(__file__).with_suffix(".cpp")
# Use glibc's vectorised functions, but keep the order of sums.
_MATH = ("-ffast-math", "-fno-associative-math", "-fno-reciprocal-math")

Kernels = Mapping[LayerShape, "AttentionKernel"]
"""The kernel for the layers of each shape."""


class _Heads(ctypes.Structure):
    """The struct `Heads` of `attention.cpp`."""

    _fields_ = (
        ("first", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, heads: torch.Tensor) -> Self:
        """Describe a tensor `[heads, tokens, dim]` whose last stride is 1."""
        return cls(heads.data_ptr(), heads.stride(0), heads.stride(1))


class _Chunks(ctypes.Structure):
    """The struct `Chunks` of `operators.cpp`."""

    _fields_ = (("first", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Call(ctypes.Structure):
    """The struct `AttentionCall` of `operators.cpp`."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("chunks", ctypes.POINTER(_Chunks)),
        ("kv_heads", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("softcap", ctypes.c_float),
    )


class AttentionKernel:
    """The kernel, compiled for the layers of one shape."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._chunks = _Chunks()
        self._function = library.attend
        pointer, number, heads = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Heads)
        self._function.argtypes = [
            *(heads, heads, heads, pointer, pointer, pointer, pointer),
            *(number, number, number, ctypes.c_float, number, ctypes.c_float, ctypes.c_int),
        ]
        self._function.restype = None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        memory: LayerMemory,
        chunks: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """Attend as `AttentionPlan.attend` does, with keys and values in a layer's memory.

        `chunks` is `[chunks, 5]`. For each chunk it has the index in `memory.keys` at which the
        strip begins, the strip's length in tokens, the position of the chunk's first token, its
        number of tokens, and the index of the first of them in the batch.
        """
        heads, tokens = query.shape[:2]
        out = query.new_empty(tokens, heads, memory.values.shape[-1])
        # Copies must stay alive during the call.
        given = [each if each.stride(2) == 1 else each.contiguous() for each in (query, key, value)]
        self._function(
            *map(_Heads.of, given),
            *(memory.keys.data_ptr(), memory.values.data_ptr(), chunks.data_ptr(), out.data_ptr()),
            *(len(chunks), heads, memory.kv_heads),
            *(layer.scaling, layer.window or 0, layer.softcap or 0.0, torch.get_num_threads()),
        )
        return out

    def call(self, memory: LayerMemory, layer: LayerAttention) -> "AttentionCall":
        """Make the kernel callable for one layer from compiled code."""
        function = ctypes.cast(self._function, ctypes.c_void_p)
        keys, values = memory.keys.data_ptr(), memory.values.data_ptr()
        chunks, limits = ctypes.pointer(self._chunks), (layer.window or 0, layer.softcap or 0.0)
        return AttentionCall(
            _Call(function, keys, values, chunks, memory.kv_heads, layer.scaling, *limits)
        )

    def bind(self, chunks: torch.Tensor) -> None:
        """Set the chunks that `AttentionCall`s attend for from now on: `chunks` is as above, and
        the caller keeps it alive."""
        self._chunks.first, self._chunks.count = chunks.data_ptr(), len(chunks)


class AttentionCall:
    """One layer's attention, for `torch.ops.infuse.kernel_attend`. `AttentionKernel.bind` sets its
    chunks."""

    def __init__(self, call: _Call) -> None:
        self._call = call

    @property
    def address(self) -> int:
        return ctypes.addressof(self._call)


def attention_kernels(shapes: Sequence[LayerShape], cache: Path) -> Kernels:
    """Load a kernel for each shape in float32 or bfloat16. Raises what `load_kernel` does."""
    found = dict.fromkeys(shape for shape in shapes if shape.dtype in NUMBERS)
    return {shape: _kernel(shape, cache) for shape in found}


def _kernel(shape: LayerShape, cache: Path) -> AttentionKernel:
    dims = (f"-DKEY_DIM={shape.key_dim}", f"-DVALUE_DIM={shape.value_dim}")
    flags = (*_MATH, *dims, *NUMBERS[shape.dtype])
    return AttentionKernel(load_kernel(_SOURCE, flags, cache))
