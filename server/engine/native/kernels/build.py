"""Compiles kernels and loads them as libraries.

A kernel links the OpenMP runtime that torch links, so that both use the same threads.
"""

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

from infuse.adapters.storage.scratch import scratch_folder

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")
# Linking is a step of its own: with -ffast-math the linker adds code that turns subnormal numbers
# off in the whole process.
_LINK = ("-shared", "-fopenmp")

NUMBERS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: (),
    # The kernels read two bfloat16 numbers as one integer.
    torch.bfloat16: ("-DBFLOAT16", "-fno-strict-aliasing"),
}
"""For each dtype of a kernel's tensors, the compiler flags that `number.h` reads."""


def load_kernel(
    source: Path, flags: Sequence[str], cache: Path, libraries: Sequence[str] = ()
) -> ctypes.CDLL:
    """Load a kernel from the folder `cache`, or compile it into there. `libraries`: linker flags.

    Raises OSError, InvalidCxxCompiler or CalledProcessError if it cannot be compiled.
    """
    command = [get_cpp_compiler(), *_FLAGS, *flags, str(source)]
    # Part of the file's name: processors of other kinds may share the cache.
    macros = [get_cpp_compiler(), "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"]
    target = subprocess.run(macros, check=True, capture_output=True).stdout
    sources = [source, *sorted(source.parent.glob("*.h"))]
    named = (
        f"{command}{_LINK}{libraries}".encode()
        + target
        + b"".join(each.read_bytes() for each in sources)
    )
    library = cache / f"{source.stem}-{hashlib.sha256(named).hexdigest()[:16]}.so"
    try:
        return ctypes.CDLL(str(library))
    except OSError:  # The file is missing or damaged.
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder(cache, ".building-") as folder:
            part, linked = f"{folder}/part.o", folder / library.name
            subprocess.run([*command, "-o", part], check=True, capture_output=True)
            link = [get_cpp_compiler(), *_LINK, part, *libraries, "-o", str(linked)]
            subprocess.run(link, check=True, capture_output=True)
            linked.replace(library)
    return ctypes.CDLL(str(library))
