"""From a kernel's source to a loaded library.

A kernel's threads are those that torch and oneDNN use, as it links the same OpenMP runtime.
"""

import ctypes
import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch._inductor.cpp_builder import get_cpp_compiler

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-c")
# Linked apart: with -ffast-math it would turn subnormal numbers off, for all of the process.
_LINK = ("-shared", "-fopenmp")

NUMBERS: dict[torch.dtype, tuple[str, ...]] = {
    torch.float32: (),
    # Products read two numbers as one.
    torch.bfloat16: ("-DBFLOAT16", "-fno-strict-aliasing"),
}
"""Flags that say what a kernel's tensors hold, as `number.h` reads them."""


def load_kernel(
    source: Path, flags: Sequence[str], cache: Path, libraries: Sequence[str] = ()
) -> ctypes.CDLL:
    """Compiled into `cache`, or found there. `libraries`: flags of the linker.

    Raises OSError, InvalidCxxCompiler or CalledProcessError where nothing compiles here.
    """
    command = [get_cpp_compiler(), *_FLAGS, *flags, str(source)]
    # Unlike processors may share a cache: the macros say what is native to this one.
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
    except OSError:  # It is not there, or damaged.
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as folder:
            part, linked = f"{folder}/part.o", Path(folder, library.name)
            subprocess.run([*command, "-o", part], check=True, capture_output=True)
            link = [get_cpp_compiler(), *_LINK, part, *libraries, "-o", str(linked)]
            subprocess.run(link, check=True, capture_output=True)
            linked.replace(library)
    return ctypes.CDLL(str(library))
