"""Linear layers packed once, for oneDNN or our own kernel: faster than `F.linear` on CPUs.

oneDNN's two operators are torch's own (its Inductor backend uses them) but not public, so each
dtype is tried on a small example first, and layers of one that fails stay as they are.
"""

import timeit
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from server.engine.native.kernels.product import KernelProduct, Pack, Product
from server.engine.native.model.quantization import is_quantized

_USUAL_TOKENS = 128
"""oneDNN chooses the layout for products of so many rows; it serves all numbers, one row too."""
_MEASURED_ROWS = (1, 32, 512)
"""One decoding row, many of them, a prompt's chunk."""
_MEASURED_BYTES = 1 << 26
"""Bytes of weights that are measured: no cache holds them, as none holds a model's."""
_TURNS = 5


def pack_for_onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = _pack(weight)
    return lambda x: _packed_linear(x, packed, bias)


_METADATA = frozenset(
    {"__get__", "__repr__", "dim", "element_size", "is_complex", "is_floating_point", "numel"}
    | {"size", "stride"}
)
"""What may be asked of a weight without reading its values. All attributes are `__get__`."""


class WeightIsPacked(RuntimeError):
    """A model read the values of a packed layer's weight, which lie elsewhere."""


class _Shell(torch.Tensor):
    """A weight's dtype, shape and device, without its values: torch would compute with a plain
    meta tensor, and give uninitialised memory.

    Anything that reads the values raises WeightIsPacked.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _METADATA:
            raise WeightIsPacked(
                f"{func.__name__} reads the weight of a layer that is packed; set pack-linears to "
                "false to run this model"
            )
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


class _Packed(nn.Module):
    """What stands for an `nn.Linear` whose weight lies elsewhere."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.weight = torch.empty_like(linear.weight, device="meta").as_subclass(_Shell)
        """Only its dtype and shape: some models ask for them."""


class PackedLinear(_Packed):
    """`nn.Linear` for inference, packed for any batch size."""

    def __init__(self, linear: nn.Linear, pack: Pack = pack_for_onednn) -> None:
        super().__init__(linear)
        self.product = pack(linear.weight.detach(), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class Siblings:
    """Layers that read the same input, packed as one: a product instead of several small ones."""

    def __init__(self, linears: Sequence[nn.Linear], pack: Pack) -> None:
        self.widths = [linear.out_features for linear in linears]
        biases: list[torch.Tensor] = [each.bias for each in linears if each.bias is not None]
        self.product = pack(
            torch.cat([linear.weight.detach() for linear in linears]),
            torch.cat(biases) if biases else None,
        )
        """Computes all of them, side by side."""
        edges = pairwise(accumulate(self.widths, initial=0))
        self.columns = [slice(start, stop) for start, stop in edges]
        self._input: torch.Tensor | None = None
        self._product: torch.Tensor | None = None
        self._taken: set[int] = set()

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """A member's columns, which nobody else reads. The first to come computes those of all,
        and so does one whose input is another (an adapter has rescaled it)."""
        if self._product is None or x is not self._input or member in self._taken:
            self._input, self._taken = x, set()
            self._product = self.product(x)
        y = self._product[..., self.columns[member]]
        self._taken.add(member)
        if len(self._taken) == len(self.widths):
            self._input = self._product = None
        return y


class PackedSibling(_Packed):
    """One of several `nn.Linear` that read the same input: a view of what they give together."""

    def __init__(self, linear: nn.Linear, siblings: Siblings, member: int) -> None:
        super().__init__(linear)
        self.siblings = siblings
        self._member = member

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.siblings.take(self._member, x)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _USUAL_TOKENS)
    return packed


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


def packing_works(dtype: torch.dtype, pack: Pack = pack_for_onednn) -> bool:
    """Whether this build and this processor compute a packed layer in `dtype`, rightly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    x = torch.randn(1, 5, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        found = pack(weight, bias)(x)
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    tolerance = 16 * torch.finfo(dtype).eps
    return torch.allclose(found, F.linear(x, weight, bias), rtol=tolerance, atol=tolerance)


def speed_of(dtype: torch.dtype) -> float:
    """How many times as fast as in float32 oneDNN computes 32 rows in `dtype`, by a short
    measurement; 0 where it does not compute rightly."""
    if not packing_works(dtype):
        return 0.0
    usual, other = _costs([(pack_for_onednn, each) for each in (torch.float32, dtype)], [32])
    return usual / other


def fastest(packs: Sequence[Pack], dtype: torch.dtype) -> Pack | None:
    """The fastest over small and large batches, by a short measurement, of the packs that compute
    rightly; None where none does."""
    right = [pack for pack in packs if packing_works(dtype, pack)]
    if len(right) < 2:
        return next(iter(right), None)
    costs = _costs([(pack, dtype) for pack in right], _MEASURED_ROWS)
    return right[costs.index(min(costs))]


@torch.inference_mode()
def _costs(kinds: Sequence[tuple[Pack, torch.dtype]], rows: Sequence[int]) -> list[float]:
    """The product, for each kind, of the least seconds that each number of rows takes. All are
    measured in turns: a busy moment must not decide."""
    costs = [1.0] * len(kinds)
    layers = [
        [pack(weight, None) for _ in range(_MEASURED_BYTES // weight.nbytes)]
        for pack, dtype in kinds
        for weight in [torch.randn(1024, 1024).to(dtype)]
    ]
    for tokens in rows:
        # A large product reads its weights many times, so that one layer is enough.
        calls = [
            partial(_run, each[: max(1, 512 // tokens)], torch.randn(1, tokens, 1024).to(dtype))
            for each, (_, dtype) in zip(layers, kinds, strict=True)
        ]
        turns = [[timeit.timeit(call, number=1) for call in calls] for _ in range(_TURNS)]
        least = map(min, zip(*turns, strict=True))
        costs = [cost * seconds for cost, seconds in zip(costs, least, strict=True)]
    return costs


def _run(layers: Sequence[Product], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


class _Reads(TorchFunctionMode):
    """Notes which linear layers' weights are read by anything but the layers themselves."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._inside: nn.Module | None = None
        linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
        self._of = {id(linear.weight): (name, linear) for name, linear in linears.items()}
        shared = {
            id(parameter)
            for module in model.modules()
            if type(module) is not nn.Linear
            for parameter in module.parameters(recurse=False)
        }
        self._of = {each: found for each, found in self._of.items() if each not in shared}
        self.hooks = [
            hook
            for linear in linears.values()
            for hook in (
                linear.register_forward_pre_hook(lambda module, _: self._enter(module)),
                linear.register_forward_hook(lambda *_: self._enter(None)),
            )
        ]

    def _enter(self, module: nn.Module | None) -> None:
        self._inside = module

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ not in _METADATA:
            for argument in args:
                name, linear = self._of.get(id(argument), ("", None))
                if linear is not None and linear is not self._inside:
                    self.names.add(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def noting_reads(model: nn.Module) -> Iterator[set[str]]:
    """Within, a forward of the model tells which of its linear layers have a weight that is read
    past the layer: by a router that converts it, say. A weight that another module owns too stays
    where it is anyway."""
    reads = _Reads(model)
    try:
        with reads:
            yield reads.names
    finally:
        for hook in reads.hooks:
            hook.remove()


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


def pack_linears(
    model: nn.Module,
    siblings: Sequence[Sequence[str]] = (),
    kernels: Mapping[torch.dtype, Pack] = MappingProxyType({}),
    read: Collection[str] = (),
) -> int:
    """Replace every plain `nn.Linear` on the CPU, in place, and drop its unpacked weight; groups of
    `siblings`, which read the same tensor, become one product.

    Layers in `read`, whose weight the model reads itself, stay as they are.

    `kernels`: what else than oneDNN may compute a dtype's products. A weight that another module
    also uses (a tied LM head's) stays for that module. Returns how many layers were packed.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name not in read
        and not is_quantized(module)
        and module.weight.device.type == "cpu"
    }
    packs: dict[torch.dtype, Pack] = {}
    for dtype in {linear.weight.dtype for linear in linears.values()}:
        candidates: list[Pack] = [pack_for_onednn]
        if dtype in kernels:
            candidates.append(kernels[dtype])
        if (pack := fastest(candidates, dtype)) is not None:
            packs[dtype] = pack
    linears = {name: each for name, each in linears.items() if each.weight.dtype in packs}
    alone = dict(linears)
    for group in siblings:
        if alone.keys() >= set(group) and _fit_together(model, group):
            members = [alone.pop(name) for name in group]
            _pack_siblings(model, group, members, packs[members[0].weight.dtype])
    for name, linear in alone.items():
        model.set_submodule(name, PackedLinear(linear, packs[linear.weight.dtype]))
    if linears:
        # A checkpoint's file stays mapped in memory as long as one tensor of it lives.
        for tensor in [*model.parameters(), *model.buffers()]:
            if type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta:
                tensor.data = tensor.data.clone()
    return len(linears)


def panel_width_of(model: nn.Module) -> int | None:
    """Columns of the panels that our kernel packed the model's weights in; None: it packed none."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and isinstance(module.product, KernelProduct):
            return module.product.panel_width
    return None


def _fit_together(model: nn.Module, group: Sequence[str]) -> bool:
    """Whether a group's weights and biases can stand in one matrix."""
    modules = [model.get_submodule(name) for name in group]
    kinds = {(m.weight.dtype, m.bias is None) for m in modules if isinstance(m, nn.Linear)}
    return 1 < len(modules) == len(set(group)) and len(kinds) == 1


def _pack_siblings(
    model: nn.Module, group: Sequence[str], linears: Sequence[nn.Linear], pack: Pack
) -> None:
    siblings = Siblings(linears, pack)
    for member, (name, linear) in enumerate(zip(group, linears, strict=True)):
        model.set_submodule(name, PackedSibling(linear, siblings, member))
