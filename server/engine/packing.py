"""Linear layers packed once for oneDNN: 1.2 to 2.7 times as fast as `F.linear` on CPUs.

The two operators are torch's own (its Inductor backend uses them) but not public, so each layer's
kind is tried on a small example first, and what fails that stays as it is.
"""

import timeit
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.quantization import is_quantized

_USUAL_TOKENS = 128
"""oneDNN chooses the layout for products of so many rows; it serves all numbers, one row too."""


class _Packed(nn.Module):
    """What stands for an `nn.Linear` whose weight lies elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.weight = torch.empty_like(linear.weight, device="meta")
        """Only its dtype and shape: some models ask for them."""


class PackedLinear(_Packed):
    """`nn.Linear` for inference, its weight in oneDNN's blocked layout for any batch size."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.packed = _pack(linear.weight.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _packed_linear(x, self.packed, self.bias)


class Siblings:
    """Layers that read the same input, packed as one: a product instead of several small ones."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self.packed = _pack(torch.cat([linear.weight.detach() for linear in linears]))
        self.widths = [linear.out_features for linear in linears]
        biases: list[torch.Tensor] = [each.bias for each in linears if each.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._taken: set[int] = set()

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., sum of the widths]`: what all of them give, side by side."""
        return _packed_linear(x, self.packed, self.bias)

    def take(self, member: int, x: torch.Tensor, columns: slice) -> torch.Tensor:
        """A member's columns, which nobody else reads. The first to come computes those of all,
        and so does one whose input is another (an adapter has rescaled it)."""
        if self._product is None or x is not self._input or member in self._taken:
            self._input, self._taken = x, set()
            self._product = self.product(x)
        y = self._product[..., columns]
        self._taken.add(member)
        if len(self._taken) == len(self.widths):
            self._input = self._product = None
        return y


class PackedSibling(_Packed):
    """One of several `nn.Linear` that read the same input: a view of what they give together."""

    def __init__(self, linear: nn.Linear, siblings: Siblings, member: int, columns: slice) -> None:
        super().__init__(linear)
        self.siblings = siblings
        self._member = member
        self._columns = columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.take(self._member, x, self._columns)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_TOKENS)
    return packed


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


def packing_works(dtype: torch.dtype) -> bool:
    """Whether this build and this processor compute a packed layer in `dtype`, rightly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(1, 5, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        found = _packed_linear(x, _pack(weight), bias)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.allclose(found, F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


def speed_of(dtype: torch.dtype) -> float:
    """How many times as fast as in float32 a packed layer computes 32 rows in `dtype`, by a short
    measurement; 0 where it does not compute rightly."""
    if not packing_works(dtype):
        return 0.0
    weight, x = torch.randn(1024, 1024), torch.randn(1, 32, 1024)
    seconds = {}
    with torch.inference_mode():
        for each in (torch.float32, dtype):
            product = partial(_packed_linear, x.to(each), _pack(weight.to(each)), None)
            seconds[each] = min(timeit.repeat(product, repeat=9, number=3))
    return seconds[torch.float32] / seconds[dtype]


@contextmanager
def noting_siblings(model: nn.Module) -> Iterator[list[list[str]]]:
    """Within, a forward of the model tells which of a module's linear layers read the same tensor:
    groups of names, in order, most of them of one."""
    groups: list[list[str]] = []
    last: list[tuple[torch.Tensor, str]] = []

    def note(name: str, x: torch.Tensor) -> None:
        parent = name.rpartition(".")[0]
        if last and last[0][0] is x and last[0][1] == parent:
            groups[-1].append(name)
        else:
            groups.append([name])
        last[:] = [(x, parent)]

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    try:
        yield groups
    finally:
        for hook in hooks:
            hook.remove()


def pack_linears(model: nn.Module, siblings: Sequence[Sequence[str]] = ()) -> int:
    """Replace every plain `nn.Linear` on the CPU, in place, and drop its unpacked weight; groups of
    `siblings`, which read the same tensor, become one product.

    A weight that another module also uses (a tied LM head's) stays for that module. Returns how
    many layers were packed.
    """
    works: dict[torch.dtype, bool] = {}

    def packable(name: str) -> bool:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear or is_quantized(module):
            return False
        if module.weight.device.type != "cpu":
            return False
        dtype = module.weight.dtype
        if dtype not in works:
            works[dtype] = packing_works(dtype)
        return works[dtype]

    names = [name for name, _ in model.named_modules() if packable(name)]
    alone = set(names)
    for group in siblings:
        if alone.issuperset(group) and _fit_together(model, group):
            alone.difference_update(group)
            _pack_siblings(model, group)
    for name in alone:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, PackedLinear(module))
    if names:
        # A checkpoint's file stays mapped in memory as long as one tensor of it lives.
        for tensor in [*model.parameters(), *model.buffers()]:
            if type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta:
                tensor.data = tensor.data.clone()
    return len(names)


def _fit_together(model: nn.Module, group: Sequence[str]) -> bool:
    """Whether a group's weights and biases can stand in one matrix."""
    modules = [model.get_submodule(name) for name in group]
    kinds = {(m.weight.dtype, m.bias is None) for m in modules if isinstance(m, nn.Linear)}
    return 1 < len(modules) == len(set(group)) and len(kinds) == 1


def _pack_siblings(model: nn.Module, group: Sequence[str]) -> None:
    modules = [model.get_submodule(name) for name in group]
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    siblings = Siblings(linears)
    start = 0
    for member, (name, linear) in enumerate(zip(group, linears, strict=True)):
        columns = slice(start, start + linear.out_features)
        model.set_submodule(name, PackedSibling(linear, siblings, member, columns))
        start = columns.stop
