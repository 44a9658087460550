"""Linear layers packed once, for oneDNN or our own kernel: faster than `F.linear` on CPUs.

oneDNN's two operators are torch's own (its Inductor backend uses them) but not public, so each
dtype is tried on a small example first, and layers of one that fails stay as they are.
"""

import timeit
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import nn

from server.engine.quantization import is_quantized

_USUAL_TOKENS = 128
"""oneDNN chooses the layout for products of so many rows; it serves all numbers, one row too."""
_MEASURED_ROWS = (1, 32, 512)
"""One decoding row, many of them, a prompt's chunk."""
_MEASURED_BYTES = 1 << 26
"""Of weights: no cache holds them, as none holds a model's."""
_TURNS = 5


Product = Callable[[torch.Tensor], torch.Tensor]
"""`[..., inputs]` to `[..., outputs]`: a linear layer's weight and bias, in their own layout."""
Pack = Callable[[torch.Tensor, torch.Tensor | None], Product]
"""From a weight `[outputs, inputs]` and a bias."""


def pack_for_onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = _pack(weight)
    return lambda x: _packed_linear(x, packed, bias)


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
        """Of all of them, side by side."""
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
    """Of those that compute rightly, the one that is fastest over small and large batches, by a
    short measurement; None where none is right."""
    right = [pack for pack in packs if packing_works(dtype, pack)]
    if len(right) < 2:
        return next(iter(right), None)
    costs = _costs([(pack, dtype) for pack in right], _MEASURED_ROWS)
    return right[costs.index(min(costs))]


@torch.inference_mode()
def _costs(kinds: Sequence[tuple[Pack, torch.dtype]], rows: Sequence[int]) -> list[float]:
    """Of each kind, seconds for so many rows at their least, multiplied. All are measured in turns:
    a busy moment must not decide."""
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
    packable: Collection[str] | None = None,
) -> int:
    """Replace every plain `nn.Linear` on the CPU, in place, and drop its unpacked weight; groups of
    `siblings`, which read the same tensor, become one product.

    `kernels`: what else than oneDNN may compute a dtype's products. A weight that another module
    also uses (a tied LM head's) stays for that module. `packable`: the layers that a forward calls;
    of others (Mamba's `dt_proj`) the model may read the weight itself. None: all.
    Returns how many layers were packed.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (packable is None or name in packable)
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
