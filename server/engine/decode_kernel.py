"""Attention of decoding rows as a kernel in C++, for a server that may compile.

torch's batched products read keys and values at half of the memory's speed: for one token a row
they are too small. The kernel's threads are those that torch and oneDNN use, as it links the same
OpenMP runtime.
"""

import ctypes
import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from server.engine.attention import LayerAttention, LayerShape

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC", "-c")
# Linked apart: with -ffast-math it would turn subnormal numbers off, for all of the process.
_LINK = ("-shared", "-fopenmp")

Dims = tuple[int, int]
"""Of keys and of values."""


class DecodeKernel:
    def __init__(self, library: Path) -> None:
        self._function = ctypes.CDLL(str(library)).decode
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


def build_kernels(shapes: Sequence[LayerShape], cache: Path) -> Mapping[Dims, DecodeKernel]:
    """One for each size of float32 heads, compiled into `cache` or found there.

    Raises OSError and subprocess.CalledProcessError where nothing compiles here.
    """
    found = {(shape.key_dim, shape.value_dim) for shape in shapes if shape.dtype == torch.float32}
    return {dims: _build(dims, cache) for dims in sorted(found)}


def _build(dims: Dims, cache: Path) -> DecodeKernel:
    command = [
        *(get_cpp_compiler(), *_FLAGS, str(_SOURCE)),
        *(f"-DKEY_DIM={dims[0]}", f"-DVALUE_DIM={dims[1]}"),
    ]
    capabilities = torch.backends.cpu.get_cpu_capability()
    named = f"{command}{_LINK}{capabilities}".encode() + _SOURCE.read_bytes()
    library = cache / f"decode-{hashlib.sha256(named).hexdigest()[:16]}.so"
    try:
        return DecodeKernel(library)
    except OSError:  # It is not there, or damaged.
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:
            part, linked = f"{folder}/part.o", Path(folder, library.name)
            subprocess.run([*command, "-o", part], check=True, capture_output=True)
            link = [get_cpp_compiler(), *_LINK, part, "-o", str(linked)]
            subprocess.run(link, check=True, capture_output=True)
            linked.replace(library)
    return DecodeKernel(library)
