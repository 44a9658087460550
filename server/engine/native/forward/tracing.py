"""The flat forward as straight-line code: torch's operators one after the other, no modules.

At one row a forward through transformers' modules takes a fifth of its time to get from operator
to operator. So it is traced once, for any number of tokens. Linear layers and attention stay calls
into our own code: what adapters and the running step do there changes.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

from adapters.model.slots import IA3Slots
from server.engine.native.attention import AttentionPlan, LayerAttention, Probe, StepContext
from server.engine.native.forward.seams import (
    Product,
    Seam,
    innermost,
    seams_of,
    siblings_of,
    width_of,
)
from server.engine.native.kernels.operators import ATTEND, LINEAR
from server.engine.native.model.packing import Siblings

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids and positions, `[1, tokens]` each, and whose logits are asked for, `[index]`:
`[index, vocab]`."""

_TRACED = (7, 5)
"""Tokens and logits of the trace: unequal, so that they are two symbols."""
_TRIED = ((1, 1), (2, 0), (9, 4))
"""The same of each example on which a trace must give what the modules give."""

_FRESH = (torch.ops.aten.mul.Tensor, torch.ops.aten.gelu.default, torch.ops.aten.relu.default)
"""What comes before a feed-forward's last layer. None of them gives a view."""


class NotTraced(Exception):
    """The message says why a model runs by its modules."""


@dataclass(frozen=True)
class Trace:
    """A forward as a graph. Linear layers and attention are operators of ours, whose numbers say
    which."""

    graph: fx.Graph
    """Its first arguments are the constants."""
    constants: Sequence[torch.Tensor]
    seams: Sequence[Seam]
    layers: Sequence[LayerAttention]

    def opened(self) -> fx.Graph:
        """A copy with products for linear layers. Raises NotTraced."""
        copy = fx.Graph()
        copy.output(copy.graph_copy(self.graph, {}))
        _open(copy, self.seams)
        return copy


class TracedForward:
    """A forward without modules. It computes what they do, but for modules that adapters bring."""

    def __init__(self, ia3: IA3Slots, context: StepContext, trace: Trace) -> None:
        self.trace = trace
        self._ia3 = ia3
        graph = trace.opened()
        for node in graph.nodes:
            if node.target is ATTEND:
                *tensors, number = node.args
                node.target, node.args = attend_in(context, trace.layers[number]), tuple(tensors)
        _use_bindings(graph)
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
        version = self._ia3.version.layers
        if self._bound != version:
            self._names.update({name: each.bind() for name, each in self._products.items()})
            self._bound = version
        logits: torch.Tensor = self._run(None, *self.trace.constants, ids, positions, keep)
        return logits


def trace(ia3: IA3Slots, context: StepContext, forward: Forward) -> TracedForward:
    """`forward`, which runs the model, without its modules.

    Raises NotTraced where that cannot be, or gives anything else on an example.
    """
    try:
        check_traceable(ia3.base)
        seams = list(seams_of(ia3.base))
        layers: list[LayerAttention] = []
        graph_module = _traced(ia3.base, context, forward, seams, layers)
        constants = _lift_constants(graph_module)
        traced = TracedForward(ia3, context, Trace(graph_module.graph, constants, seams, layers))
        check_alike(context, forward, traced, ia3.base.device)
    except Exception as error:  # Whatever a model's code does that cannot be traced.
        raise NotTraced(str(error).strip().split("\n")[0]) from error
    return traced


def check_traceable(base: PreTrainedModel) -> None:
    """Raises NotTraced where a trace would miss something."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in base.modules()):
        raise NotTraced("its modules have hooks")


def probing(_tokens: int) -> AttentionPlan:
    """A plan for a forward whose attention does not matter."""
    return Probe()


@torch.inference_mode()
def check_alike(
    context: StepContext,
    wanted: Forward,
    found: Forward,
    device: torch.device,
    plan: Callable[[int], AttentionPlan] = probing,
    tolerance: float = 0.0,
) -> None:
    """Raises NotTraced where two forwards give unlike logits. `plan`: for so many tokens;
    `tolerance`: a share of the greatest logit."""
    for tokens, kept in _TRIED:
        example = _example(tokens, kept, device)
        with context.step(plan(tokens)):
            right = wanted(*example)
        with context.step(plan(tokens)):
            logits = found(*example)
        greatest = float(right.abs().max()) if kept else 0.0
        if not torch.allclose(logits, right, rtol=0, atol=tolerance * greatest):
            raise NotTraced(f"{tokens} tokens give something else")


class _TracePlan:
    """Attention's place in a trace."""

    def __init__(self, layers: list[LayerAttention]) -> None:
        self._layers = layers

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        self._layers.append(layer)
        out: torch.Tensor = ATTEND(query, key, value, len(self._layers) - 1)
        return out


@contextmanager
def _opened(seams: Sequence[Seam]) -> Iterator[None]:
    """Within, each linear layer is an operator with its seam's number."""

    def stub(number: int, linear: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = width_of(linear)
        siblings = siblings_of(linear)
        stride = outputs if siblings is None else sum(siblings.widths)
        y: torch.Tensor = LINEAR(x, number, outputs, stride)
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
    example = traced_example(base.device)
    with torch.no_grad(), context.step(_TracePlan(layers)), _opened(seams):
        graph_module: fx.GraphModule = make_fx(
            forward, tracing_mode="symbolic", _allow_non_fake_inputs=True
        )(*example)
    ids = next(iter(graph_module.graph.nodes)).meta["val"]
    if guards := ids.fake_mode.shape_env.guards:
        raise NotTraced(f"it depends on {guards[0].expr}")
    for node in graph_module.graph.nodes:
        node.meta = {}  # The trace's own tensors: nobody else's business.
    return graph_module


def traced_example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a forward is traced with; all sizes that are not one may be others."""
    return _example(*_TRACED, device)


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
            node.replace_all_uses_with(found[name])
            graph.erase_node(node)
    return [getattr(graph_module, name) for name in found]


def _open(graph: fx.Graph, seams: Sequence[Seam]) -> None:
    """Put products where the trace has operators for linear layers."""
    groups: dict[tuple[fx.Node, Siblings], list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is not LINEAR:
            continue
        x, number = node.args[:2]
        siblings = siblings_of(seams[number].layer)
        if siblings is None:
            # What an operator of arithmetic makes is new, and may be rescaled as it is.
            owns = len(x.users) == 1 and x.target in _FRESH
            node.target, node.args = Product([seams[number]], owns_input=owns), (x,)
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
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def attend_in(context: StepContext, layer: LayerAttention) -> Callable[..., torch.Tensor]:
    """A layer's attention as the step that runs then has planned it."""

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
