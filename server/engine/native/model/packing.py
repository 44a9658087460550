"""Packs linear layers for oneDNN or our own kernel, which are faster than `F.linear` on CPUs.

oneDNN's two operators are part of torch (its Inductor backend uses them) but not public. So each
dtype is tried on a small example first, and the layers of a dtype that fails stay as they are.
"""

import os
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

from infuse.server.engine.native.kernels.linear import KernelLinear, Linear, Pack
from infuse.server.engine.native.model.quantization import is_quantized

_USUAL_TOKENS = 128
"""oneDNN chooses the layout for this many tokens. The layout serves any number, one token too."""
_MEASURED_TOKENS = (1, 32, 512)
"""The tokens of one decoding row, of many, and of a prompt's chunk."""
_MEASURED_BYTES = 1 << 26
"""Bytes of weights that are measured: too many for the processor's caches, as a model's are."""
_TURNS = 5
"""How many times each measurement is repeated."""
_KEPT_SHAPES = 256
"""oneDNN prepares each pair of a layer's shape and a number of tokens, which takes up to 2 MB and a
few milliseconds, and keeps so many of them; by default 1,024, and 1,024 more in the layer above it.
Steps that only decode have fewer: 32 rows and five shapes of layers make 160."""
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    # oneDNN, and torch's layer above it, read these when they are first used.
    os.environ.setdefault(_cache, str(_KEPT_SHAPES))


def pack_for_onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    packed = _pack(weight)
    return lambda x: _packed_linear(x, packed, bias)


_METADATA = frozenset(
    {"__get__", "__repr__", "dim", "element_size", "is_complex", "is_floating_point", "numel"}
    | {"size", "stride"}
)
"""Functions of a weight that do not read its values. Attributes are read by `__get__`."""


class WeightIsPacked(RuntimeError):
    """A model read the weight of a packed layer, whose values lie in another layout."""


class _Shell(torch.Tensor):
    """A weight that has a dtype, a shape and a device, but no values.

    Reading the values raises WeightIsPacked. With a plain meta tensor torch would compute on, and
    return uninitialised memory.
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
    """Replaces an `nn.Linear`, whose weight was packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        self.weight = torch.empty_like(linear.weight, device="meta").as_subclass(_Shell)
        """Only dtype and shape, which some models read."""


class PackedLinear(_Packed):
    """A packed `nn.Linear`, for inference with any batch size."""

    def __init__(self, linear: nn.Linear, pack: Pack = pack_for_onednn) -> None:
        super().__init__(linear)
        self.linear = pack(linear.weight.detach(), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Siblings:
    """Linear layers that read the same input, packed as one layer: one GEMM instead of several."""

    def __init__(self, linears: Sequence[nn.Linear], pack: Pack) -> None:
        self.widths = [linear.out_features for linear in linears]
        biases: list[torch.Tensor] = [each.bias for each in linears if each.bias is not None]
        self.linear = pack(
            torch.cat([linear.weight.detach() for linear in linears]),
            torch.cat(biases) if biases else None,
        )
        """Computes the outputs of all layers, side by side."""
        edges = pairwise(accumulate(self.widths, initial=0))
        self.columns = [slice(start, stop) for start, stop in edges]
        self._input: torch.Tensor | None = None
        self._outputs: torch.Tensor | None = None
        self._taken: set[int] = set()

    def take(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """Return the columns of one layer; each caller gets its own.

        The first caller computes the columns of all layers. So does a caller with another input,
        which an adapter has rescaled.
        """
        if self._outputs is None or x is not self._input or member in self._taken:
            self._input, self._taken = x, set()
            self._outputs = self.linear(x)
        y = self._outputs[..., self.columns[member]]
        self._taken.add(member)
        if len(self._taken) == len(self.widths):
            self._input = self._outputs = None
        return y


class PackedSibling(_Packed):
    """Replaces one of several `nn.Linear` that read the same input and are packed as one."""

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
    """Whether a packed layer in `dtype` gives the right result on this processor."""
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
    """Measure how many times as fast as float32 oneDNN computes 32 tokens in `dtype`. 0: it gives
    wrong results."""
    if not packing_works(dtype):
        return 0.0
    usual, other = costs([(pack_for_onednn, each) for each in (torch.float32, dtype)], [32])
    return usual / other


def fastest(packs: Sequence[Pack], dtype: torch.dtype) -> Pack | None:
    """Measure which of `packs` is fastest over small and large batches. Packs with wrong results
    are left out. None: all are wrong."""
    right = [pack for pack in packs if packing_works(dtype, pack)]
    if len(right) < 2:
        return next(iter(right), None)
    measured = costs([(pack, dtype) for pack in right], _MEASURED_TOKENS)
    return right[measured.index(min(measured))]


@torch.inference_mode()
def costs(kinds: Sequence[tuple[Pack, torch.dtype]], sizes: Sequence[int]) -> list[float]:
    """Measure each kind: the least seconds for each number of tokens in `sizes`, multiplied.

    The kinds take turns, so that a moment in which the machine is busy does not decide.
    """
    found = [1.0] * len(kinds)
    layers = [
        [pack(weight, None) for _ in range(_MEASURED_BYTES // weight.nbytes)]
        for pack, dtype in kinds
        for weight in [torch.randn(1024, 1024).to(dtype)]
    ]
    for tokens in sizes:
        # A large matmul reads its weights many times, so that one layer is enough.
        calls = [
            partial(_run, each[: max(1, 512 // tokens)], torch.randn(1, tokens, 1024).to(dtype))
            for each, (_, dtype) in zip(layers, kinds, strict=True)
        ]
        turns = [[timeit.timeit(call, number=1) for call in calls] for _ in range(_TURNS)]
        least = map(min, zip(*turns, strict=True))
        found = [cost * seconds for cost, seconds in zip(found, least, strict=True)]
    return found


def _run(layers: Sequence[Linear], x: torch.Tensor) -> None:
    for layer in layers:
        layer(x)


class _Reads(TorchFunctionMode):
    """Notes the linear layers whose weights are read by other code than the layers' own."""

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
    """Collect the names of linear layers whose weights a forward reads outside of the layers.

    A router that converts a weight is an example. Weights that another module owns too are left
    out, since they are never dropped.
    """
    reads = _Reads(model)
    try:
        with reads:
            yield reads.names
    finally:
        for hook in reads.hooks:
            hook.remove()


@contextmanager
def noting_siblings(model: nn.Module) -> Iterator[list[list[str]]]:
    """Collect which linear layers of a module read the same tensor in a forward: groups of names,
    in order, most of one name."""
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
    """Pack every plain `nn.Linear` of the model on the CPU, in place, and drop its weight.

    `siblings`: groups of layers that read the same tensor and are packed as one. `kernels`: for
    each dtype, what may compute its layers beside oneDNN. `read`: layers whose weight other code
    reads; they stay as they are. A weight that another module also owns (a tied LM head's) stays in
    that module. Returns how many layers were packed.
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
        # A checkpoint's file stays mapped as long as any tensor refers to it.
        for tensor in [*model.parameters(), *model.buffers()]:
            if type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_meta:
                tensor.data = tensor.data.clone()
    return len(linears)


def panel_width_of(model: nn.Module) -> int | None:
    """How many columns the panels of our kernel have. None: it packed no layer of the model."""
    for module in model.modules():
        if isinstance(module, PackedLinear) and isinstance(module.linear, KernelLinear):
            return module.linear.panel_width
    return None


def _fit_together(model: nn.Module, group: Sequence[str]) -> bool:
    """Whether a group's weights and biases can be concatenated."""
    modules = [model.get_submodule(name) for name in group]
    kinds = {(m.weight.dtype, m.bias is None) for m in modules if isinstance(m, nn.Linear)}
    return 1 < len(modules) == len(set(group)) and len(kinds) == 1


def _pack_siblings(
    model: nn.Module, group: Sequence[str], linears: Sequence[nn.Linear], pack: Pack
) -> None:
    siblings = Siblings(linears, pack)
    for member, (name, linear) in enumerate(zip(group, linears, strict=True)):
        model.set_submodule(name, PackedSibling(linear, siblings, member))
