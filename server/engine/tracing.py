"""The flat forward as straight-line code: torch's operators one after the other, no modules.

At one row a forward through transformers' modules takes a fifth of its time to get from operator
to operator. So it is traced once, for any number of tokens. Linear layers and attention stay calls
into our own code: what adapters and the running step do there changes.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.model import IA3Model
from server.engine.attention import LayerAttention, Probe, StepContext
from server.engine.packing import Siblings
from server.engine.seams import Product, Seam, innermost, seams_of, siblings_of

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions, `[1, tokens]` each, and whose logits are asked for, `[index]`:
`[index, vocab]`."""

_TRACED = (7, 5)
"""Tokens and logits of the trace: unequal, so that they are two symbols."""
_TRIED = ((1, 1), (2, 0), (9, 4))
"""The same of each example on which a trace must give what the modules give."""

_FRESH = (torch.ops.aten.mul.Tensor, torch.ops.aten.gelu.default, torch.ops.aten.relu.default)
"""What comes before a feed-forward's last layer. None of them gives a view."""
_COMPILED_ERROR = 1e-3
"""Of logits: kernels add up in another order."""


class NotTraced(Exception):
    """The message says why a model runs by its modules."""


_library = torch.library.Library("infuse", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, int seam, int outputs, int stride) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("attend(Tensor query, Tensor key, Tensor value, int seam) -> Tensor")  # type: ignore[no-untyped-call]


def _linear_shape(x: torch.Tensor, _seam: int, outputs: int, stride: int) -> torch.Tensor:
    wide = x.new_empty(*x.shape[:-1], stride)
    return wide[..., :outputs]


def _attend_shape(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, _seam: int
) -> torch.Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[-1])


torch.library.register_fake("infuse::linear", _linear_shape, lib=_library)
torch.library.register_fake("infuse::attend", _attend_shape, lib=_library)


class TracedForward:
    """A forward without modules. It computes what they do, but for modules that adapters bring."""

    def __init__(self, ia3: IA3Model, graph: fx.Graph, constants: Sequence[torch.Tensor]) -> None:
        self._ia3 = ia3
        self._constants = constants
        code = graph.python_code("_")
        self._names: dict[str, Any] = dict(code.globals)
        exec(code.src, self._names)
        self._run = self._names["forward"]
        self._products = {
            name: value for name, value in self._names.items() if isinstance(value, Product)
        }
        self._bound = -1

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        if self._bound != self._ia3.changes:
            self._names.update({name: each.bind() for name, each in self._products.items()})
            self._bound = self._ia3.changes
        logits: torch.Tensor = self._run(None, *self._constants, ids, positions, keep)
        return logits


def trace(
    ia3: IA3Model,
    context: StepContext,
    forward: Forward,
    compile_between: Callable[[fx.GraphModule], None] | None = None,
) -> TracedForward:
    """`forward`, which runs the model, without its modules; `compile_between` may replace what
    lies between products and attention.

    Raises NotTraced where that cannot be, or gives anything else on an example.
    """
    try:
        if any(m._forward_hooks or m._forward_pre_hooks for m in ia3.base.modules()):
            raise NotTraced("its modules have hooks")
        seams = list(seams_of(ia3.base))
        layers: list[LayerAttention] = []
        graph_module = _traced(ia3.base, context, forward, seams, layers)
        constants = _lift_constants(graph_module)
        _open(graph_module.graph, seams, layers, context)
        if compile_between is not None:
            _move_gates(graph_module.graph)
            compile_between(graph_module)
        _use_bindings(graph_module.graph)
        traced = TracedForward(ia3, graph_module.graph, constants)
        for tokens, kept in _TRIED:
            example = _example(tokens, kept, ia3.base.device)
            wanted, found = _run(context, forward, example), _run(context, traced, example)
            tolerance = 0.0 if compile_between is None else _COMPILED_ERROR
            if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
                raise NotTraced(f"{tokens} tokens give something else")
    except Exception as error:  # Whatever a model's code does that cannot be traced.
        raise NotTraced(str(error).strip().split("\n")[0]) from error
    return traced


class _TracePlan:
    """Attention's place in a trace."""

    def __init__(self, layers: list[LayerAttention]) -> None:
        self._layers = layers

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        self._layers.append(layer)
        out: torch.Tensor = torch.ops.infuse.attend(query, key, value, len(self._layers) - 1)
        return out


@contextmanager
def _opened(seams: Sequence[Seam]) -> Iterator[None]:
    """Within, each linear layer is an operator with its seam's number."""

    def stub(number: int, linear: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = linear.nf if isinstance(linear, Conv1D) else linear.out_features
        siblings = siblings_of(linear)
        stride = outputs if siblings is None else sum(siblings.widths)
        y: torch.Tensor = torch.ops.infuse.linear(x, number, outputs, stride)
        return y

    modules = [seam.layer for seam in seams]
    if len(set(modules)) < len(modules):
        raise NotTraced("a linear layer stands in two places")
    for number, module in enumerate(modules):
        module.forward = partial(stub, number, innermost(module))
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _traced(
    base: PreTrainedModel,
    context: StepContext,
    forward: Forward,
    seams: Sequence[Seam],
    layers: list[LayerAttention],
) -> fx.GraphModule:
    """Raises NotTraced where the trace holds for some numbers of tokens only."""
    tokens, kept = _TRACED
    example = _example(tokens, kept, base.device)
    with torch.no_grad(), context.step(_TracePlan(layers)), _opened(seams):
        graph_module: fx.GraphModule = make_fx(
            forward, tracing_mode="symbolic", _allow_non_fake_inputs=True
        )(*example)
    ids = next(iter(graph_module.graph.nodes)).meta["val"]
    if guards := ids.fake_mode.shape_env.guards:
        raise NotTraced(f"it depends on {guards[0].expr}")
    return graph_module


def _example(
    tokens: int, kept: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = 1 + torch.arange(tokens, device=device)[None] % 7
    return ids, torch.arange(tokens, device=device)[None], torch.arange(kept, device=device)


def _lift_constants(graph_module: fx.GraphModule) -> list[torch.Tensor]:
    """Parameters and buffers become the first arguments: local names are found fastest."""
    graph = graph_module.graph
    found: dict[str, fx.Node] = {}
    first = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = str(node.target)
            if name not in found:
                with graph.inserting_before(first):
                    found[name] = graph.placeholder(name)
                found[name].meta = node.meta
            node.replace_all_uses_with(found[name])
            graph.erase_node(node)
    return [getattr(graph_module, name) for name in found]


def _open(
    graph: fx.Graph,
    seams: Sequence[Seam],
    layers: Sequence[LayerAttention],
    context: StepContext,
) -> None:
    """Put calls into our own code where the trace has operators for them."""
    groups: dict[tuple[fx.Node, Siblings], list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.infuse.attend.default:
            *tensors, number = node.args
            node.target, node.args = _attend(context, layers[number]), tuple(tensors)
        elif node.target is torch.ops.infuse.linear.default:
            x, number = node.args[:2]
            siblings = siblings_of(seams[number].layer)
            if siblings is None:
                # What an operator of arithmetic makes is new, and may be rescaled as it is.
                owns = len(x.users) == 1 and x.target in _FRESH
                node.target = Product([seams[number]], owns_input=owns)
                node.args = (x,)
            else:
                groups.setdefault((x, siblings), []).append(node)
    for (x, siblings), nodes in groups.items():
        members = [seams[node.args[1]] for node in nodes]  # type: ignore[index]
        if len(nodes) != len(siblings.widths):
            raise NotTraced("layers that are packed as one do not read one input")
        with graph.inserting_before(nodes[0]):
            product = graph.call_function(Product(members), (x,))
            parts = [graph.call_function(operator.getitem, (product, n)) for n in range(len(nodes))]
        for node, part in zip(nodes, parts, strict=True):
            part.meta = node.meta
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def _move_gates(graph: fx.Graph) -> None:
    """Where all that is made of a product is `silu(first) * second`, let it make that; and where a
    product alone reads it, let it come with that one's vectors."""
    for product in list(graph.nodes):
        if not isinstance(product.target, Product) or not product.target.can_gate:
            continue
        gate, up = product.users
        if len(gate.users) != 1 or len(up.users) != 1:
            continue
        [activated], [result] = gate.users, up.users
        is_silu = activated.target is torch.ops.aten.silu.default and len(activated.users) == 1
        is_product = result.target is torch.ops.aten.mul.Tensor
        if not is_silu or not is_product or set(result.args) != {activated, up}:
            continue
        readers = [reader.target for reader in result.users]
        alone = len(readers) == 1 and isinstance(readers[0], Product)
        product.target.gate(readers[0] if alone else None)
        product.meta = result.meta
        result.replace_all_uses_with(product)
        for node in (result, activated, gate, up):
            graph.erase_node(node)


def _attend(context: StepContext, layer: LayerAttention) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert context.plan is not None, "a forward outside of a step"
        return context.plan.attend(query, key, value, layer).contiguous()

    return attend


def _use_bindings(graph: fx.Graph) -> None:
    """Call operators as Python code does: `torch.mul` takes two thirds of the time of
    `torch.ops.aten.mul.Tensor`."""
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        space, name = node.target._schema.name.split(".")[0].split("::")
        if space != "aten":
            continue
        if name.startswith("linalg_"):
            node.target = getattr(torch.linalg, name.removeprefix("linalg_"))
        elif hasattr(torch, name) and not name.startswith("_"):
            node.target = getattr(torch, name)
        elif hasattr(torch._C._nn, name):
            node.target = getattr(torch._C._nn, name)
        elif name in ("view", "expand"):
            node.op, node.target = "call_method", name


@torch.inference_mode()
def _run(
    context: StepContext,
    forward: Forward,
    example: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    with context.step(Probe()):
        return forward(*example)
