"""Attention of decoding rows as a kernel in C++, for a server that may compile.

torch's batched products read keys and values at half of the memory's speed: for one token a row
they are too small.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import torch

from server.engine.attention import LayerAttention, LayerShape
from server.engine.kernels.build import load_kernel
from server.engine.slabs import LayerMemory

_SOURCE = Path(__file__).with_suffix(".cpp")

Dims = tuple[int, int]
"""Of keys and of values."""


class _Heads(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
    )

    @classmethod
    def of(cls, heads: torch.Tensor) -> Self:
        """`[heads, rows, dim]`, the numbers of a head side by side."""
        return cls(heads.data_ptr(), heads.stride(0), heads.stride(1))


class DecodeKernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.decode
        pointer, number, heads = ctypes.c_void_p, ctypes.c_int64, ctypes.POINTER(_Heads)
        self._function.argtypes = [
            *(heads, heads, heads, pointer, pointer, pointer, pointer),
            *(number, number, number, ctypes.c_float, number, ctypes.c_int),
        ]
        self._function.restype = None

    def __call__(
        self,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        memory: LayerMemory,
        rows: torch.Tensor,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """`[heads, rows, key_dim]` over a layer's memory: `[rows, heads, value_dim]`.

        `new`: each row's last key and value, `[kv_heads, rows, dim]`, if they are still to be
        written. `rows` is `[rows, 3]`: where a row's strip begins, counted in heads of one token,
        how many tokens it holds, and how many of them the row sees.
        """
        heads, count = query.shape[:2]
        out = query.new_empty(count, heads, memory.values.shape[-1])
        # They must outlive the call.
        given = [
            each if each.stride(2) == 1 else each.contiguous() for each in (query, *(new or ()))
        ]
        where = [_Heads.of(each) for each in given]
        self._function(
            *(where if new else (*where, None, None)),
            *(memory.keys.data_ptr(), memory.values.data_ptr(), rows.data_ptr(), out.data_ptr()),
            *(count, heads, memory.kv_heads),
            *(layer.scaling, layer.window or 0, torch.get_num_threads()),
        )
        return out


def decode_kernels(shapes: Sequence[LayerShape], cache: Path) -> Mapping[Dims, DecodeKernel]:
    """One for each size of float32 heads. Raises what `load_kernel` does."""
    found = {(shape.key_dim, shape.value_dim) for shape in shapes if shape.dtype == torch.float32}
    return {dims: _kernel(dims, cache) for dims in sorted(found)}


def _kernel(dims: Dims, cache: Path) -> DecodeKernel:
    flags = ("-ffast-math", f"-DKEY_DIM={dims[0]}", f"-DVALUE_DIM={dims[1]}")
    return DecodeKernel(load_kernel(_SOURCE, flags, cache))
