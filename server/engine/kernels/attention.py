"""Attention of decoding rows as a kernel in C++, for a server that may compile.

torch's batched products read keys and values at half of the memory's speed: for one token a row
they are too small.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from server.engine.attention import LayerAttention, LayerShape
from server.engine.kernels.build import load_kernel

_SOURCE = Path(__file__).with_suffix(".cpp")

Dims = tuple[int, int]
"""Of keys and of values."""


class DecodeKernel:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._function = library.decode
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._function.argtypes = [
            *(pointer, number, number, pointer, pointer, pointer, pointer),
            *(number, number, number, ctypes.c_float, number, ctypes.c_int),
        ]
        self._function.restype = None

    def __call__(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rows: torch.Tensor,
        kv_heads: int,
        layer: LayerAttention,
    ) -> torch.Tensor:
        """`[heads, rows, key_dim]` over a layer's memory: `[rows, heads, value_dim]`.

        `rows` is `[rows, 3]`: where a row's strip begins, counted in heads of one token, how many
        tokens it holds, and how many of them the row sees.
        """
        if query.stride(2) != 1:
            query = query.contiguous()
        heads, count = query.shape[:2]
        out = query.new_empty(count, heads, values.shape[-1])
        self._function(
            *(query.data_ptr(), query.stride(0), query.stride(1)),
            *(keys.data_ptr(), values.data_ptr(), rows.data_ptr(), out.data_ptr()),
            *(count, heads, kv_heads, layer.scaling, layer.window or 0, torch.get_num_threads()),
        )
        return out


def decode_kernels(shapes: Sequence[LayerShape], cache: Path) -> Mapping[Dims, DecodeKernel]:
    """One for each size of float32 heads. Raises what `load_kernel` does."""
    found = {(shape.key_dim, shape.value_dim) for shape in shapes if shape.dtype == torch.float32}
    return {dims: _kernel(dims, cache) for dims in sorted(found)}


def _kernel(dims: Dims, cache: Path) -> DecodeKernel:
    flags = ("-ffast-math", f"-DKEY_DIM={dims[0]}", f"-DVALUE_DIM={dims[1]}")
    return DecodeKernel(load_kernel(_SOURCE, flags, cache))
