"""Linear layers and attention as torch operators, in traces and in compiled forwards.

`kernel_linear` and `kernel_attend` are our kernels (`operators.cpp`): a compiled forward calls them
without Python, and so without the GIL. Layers that have no kernel are calls to `linear` and
`attend`, which `compiling.py` implements in Python.
"""

from pathlib import Path

import torch

from infuse.server.engine.native.kernels.build import load_kernel

_SOURCE = Path(__file__).with_suffix(".cpp")
# torch's headers require the version of the stable interface that the source uses.
_FLAGS = ("-std=c++20", "-DTORCH_TARGET_VERSION=0x020d000000000000")

library = torch.library.Library("infuse", "DEF")  # type: ignore[no-untyped-call]
for _schema in (
    "linear(Tensor x, int number, int outputs, int stride) -> Tensor",
    "attend(Tensor query, Tensor key, Tensor value, int number) -> Tensor",
    "kernel_linear(Tensor x, Tensor calls, int number, int outputs, bool gate) -> Tensor",
    "kernel_attend(Tensor query, Tensor key, Tensor value, Tensor calls, int number) -> Tensor",
):
    library.define(_schema)  # type: ignore[no-untyped-call]


def _linear(x: torch.Tensor, _number: int, outputs: int, stride: int) -> torch.Tensor:
    wide = x.new_empty(*x.shape[:-1], stride)
    return wide[..., :outputs]


def _kernel_linear(
    x: torch.Tensor, _calls: torch.Tensor, _number: int, outputs: int, _gate: bool
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _attend(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object
) -> torch.Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


torch.library.register_fake("infuse::linear", _linear, lib=library)
torch.library.register_fake("infuse::attend", _attend, lib=library)
torch.library.register_fake("infuse::kernel_linear", _kernel_linear, lib=library)
torch.library.register_fake("infuse::kernel_attend", _attend, lib=library)


LINEAR = torch.ops.infuse.linear.default
ATTEND = torch.ops.infuse.attend.default
KERNEL_LINEAR = torch.ops.infuse.kernel_linear.default
KERNEL_ATTEND = torch.ops.infuse.kernel_attend.default


def load_operators(built: Path) -> None:
    """Register the kernels' operators, once in a process. They are compiled into the folder
    `built`, or found there. Raises what `load_kernel` does."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("infuse::kernel_linear", "CPU"):
        return
    torch_folder = Path(torch.__file__).parent
    flags = [*_FLAGS, f"-I{torch_folder / 'include'}"]
    load_kernel(_SOURCE, flags, built, [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"])
