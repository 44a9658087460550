"""Traces the flat forward to straight-line code: torch operators without modules.

With one row, a forward through transformers' modules spends a fifth of its time between operators.
So it is traced once, for any number of tokens. Linear layers and attention stay calls into our own
code, because adapters and the running step change what they compute.
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
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel

from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.native.attention import AttentionPlan, LayerAttention, Probe, StepContext
from infuse.server.engine.native.forward.linear_sites import (
    LinearSite,
    TracedLinear,
    innermost,
    linear_sites,
    siblings_of,
    width_of,
)
from infuse.server.engine.native.kernels.operators import ATTEND, LINEAR
from infuse.server.engine.native.model.packing import Siblings

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes token ids and positions, `[1, tokens]` each, and the indices `[index]` of the tokens whose
logits are wanted. Returns `[index, vocab]`."""

_TRACED = (7, 5)
"""Numbers of tokens and of logits in the trace. They differ, so that they become two symbols."""
_TRIED = ((1, 1), (2, 0), (9, 4))
"""Numbers of tokens and of logits in the examples on which a trace is compared with the modules."""

_FRESH = (torch.ops.aten.mul.Tensor, torch.ops.aten.gelu.default, torch.ops.aten.relu.default)
"""Operators before a feed-forward's last layer. Their result is never a view."""


class NotTraced(Exception):
    """The model cannot be traced; the message says why. It runs by its modules instead."""


@dataclass(frozen=True)
class Trace:
    """A forward as a graph of torch operators.

    Linear layers and attention are calls of our own operators, with the layer's number in `sites`
    or `layers`.
    """

    graph: fx.Graph
    """The first arguments are the constants."""
    constants: Sequence[torch.Tensor]
    sites: Sequence[LinearSite]
    layers: Sequence[LayerAttention]

    def with_linears(self) -> fx.Graph:
        """Copy the graph, with `TracedLinear`s for the linear layers. Raises NotTraced."""
        copy = fx.Graph()
        copy.output(copy.graph_copy(self.graph, {}))
        _insert_linears(copy, self.sites)
        return copy


class TracedForward:
    """A forward without modules. It computes what they do, except for saved modules of adapters."""

    def __init__(self, ia3: IA3Slots, context: StepContext, trace: Trace) -> None:
        self.trace = trace
        self._ia3 = ia3
        graph = trace.with_linears()
        for node in graph.nodes:
            if node.target is ATTEND:
                *tensors, number = node.args
                node.target, node.args = attend_in(context, trace.layers[number]), tuple(tensors)
        _use_bindings(graph)
        code = graph.python_code("_")
        self._names: dict[str, Any] = dict(code.globals)
        exec(code.src, self._names)
        self._run = self._names["forward"]
        self._linears = {
            name: value for name, value in self._names.items() if isinstance(value, TracedLinear)
        }
        self._bound = -1

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        version = self._ia3.version.layers
        if self._bound != version:
            self._names.update({name: each.bind() for name, each in self._linears.items()})
            self._bound = version
        logits: torch.Tensor = self._run(None, *self.trace.constants, ids, positions, keep)
        return logits


def trace(ia3: IA3Slots, context: StepContext, forward: Forward) -> TracedForward:
    """Trace `forward`, which runs the model by its modules.

    Raises NotTraced if it cannot be traced, or if the trace gives other logits on an example.
    """
    try:
        check_traceable(ia3.base)
        sites = list(linear_sites(ia3.base))
        layers: list[LayerAttention] = []
        graph_module = _traced(ia3.base, context, forward, sites, layers)
        constants = _lift_constants(graph_module)
        traced = TracedForward(ia3, context, Trace(graph_module.graph, constants, sites, layers))
        check_alike(context, forward, traced, ia3.base.device)
    except GuardOnDataDependentSymNode as error:
        raise NotTraced("its shapes depend on what tokens come, as those of experts do") from error
    except Exception as error:  # A model's code may raise anything while it is traced.
        raise NotTraced(str(error).strip().split("\n")[0]) from error
    return traced


def check_traceable(base: PreTrainedModel) -> None:
    """Raises NotTraced if a trace would leave something out."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in base.modules()):
        raise NotTraced("its modules have hooks")


def probing(_tokens: int) -> AttentionPlan:
    """Plan attention by a probe, for comparing forwards without a cache."""
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
    """Raises NotTraced if two forwards give different logits on the examples.

    `plan` plans the attention for a number of tokens. `tolerance` is a share of the greatest logit.
    """
    for tokens, kept in _TRIED:
        example = _example(tokens, kept, device)
        with context.step(plan(tokens)):
            right = wanted(*example)
        with context.step(plan(tokens)):
            logits = found(*example)
        greatest = float(right.abs().max()) if kept else 0.0
        if not torch.allclose(logits, right, rtol=0, atol=tolerance * greatest):
            raise NotTraced(f"{tokens} tokens give other logits")


class _TracePlan:
    """An attention plan for tracing: it records each layer as a call of our operator."""

    def __init__(self, layers: list[LayerAttention]) -> None:
        self._layers = layers

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: LayerAttention
    ) -> torch.Tensor:
        self._layers.append(layer)
        out: torch.Tensor = ATTEND(query, key, value, len(self._layers) - 1)
        return out


@contextmanager
def _as_operators(sites: Sequence[LinearSite]) -> Iterator[None]:
    """Within this context, each linear layer calls our operator with its number in `sites`."""

    def stub(number: int, linear: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = width_of(linear)
        siblings = siblings_of(linear)
        stride = outputs if siblings is None else sum(siblings.widths)
        y: torch.Tensor = LINEAR(x, number, outputs, stride)
        return y

    modules = [site.layer for site in sites]
    if len(set(modules)) < len(modules):
        raise NotTraced("a linear layer is used in two modules")
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
    sites: Sequence[LinearSite],
    layers: list[LayerAttention],
) -> fx.GraphModule:
    """Raises NotTraced if the trace is valid for some numbers of tokens only."""
    example = traced_example(base.device)
    with torch.no_grad(), context.step(_TracePlan(layers)), _as_operators(sites):
        graph_module: fx.GraphModule = make_fx(
            forward, tracing_mode="symbolic", _allow_non_fake_inputs=True
        )(*example)
    ids = next(iter(graph_module.graph.nodes)).meta["val"]
    if guards := ids.fake_mode.shape_env.guards:
        raise NotTraced(f"it depends on {guards[0].expr}")
    for node in graph_module.graph.nodes:
        node.meta = {}  # It holds the tensors of the trace, which are not needed.
    return graph_module


def traced_example(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs that a forward is traced with. Sizes other than 1 become symbols."""
    return _example(*_TRACED, device)


def _example(
    tokens: int, kept: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = 1 + torch.arange(tokens, device=device)[None] % 7
    return ids, torch.arange(tokens, device=device)[None], torch.arange(kept, device=device)


def _lift_constants(graph_module: fx.GraphModule) -> list[torch.Tensor]:
    """Make parameters and buffers the first arguments, since Python finds local names fastest."""
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


def _insert_linears(graph: fx.Graph, sites: Sequence[LinearSite]) -> None:
    """Replace the operators for linear layers by `TracedLinear`s."""
    groups: dict[tuple[fx.Node, Siblings], list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.target is not LINEAR:
            continue
        x, number = node.args[:2]
        siblings = siblings_of(sites[number].layer)
        if siblings is None:
            # The operator's result is a new tensor, which may be rescaled in place.
            owns = len(x.users) == 1 and x.target in _FRESH
            node.target, node.args = TracedLinear([sites[number]], owns_input=owns), (x,)
        else:
            groups.setdefault((x, siblings), []).append(node)
    for (x, siblings), nodes in groups.items():
        members = [sites[node.args[1]] for node in nodes]  # type: ignore[index]
        if len(nodes) != len(siblings.widths):
            raise NotTraced("layers that are packed as one do not read one input")
        with graph.inserting_before(nodes[0]):
            linear = graph.call_function(TracedLinear(members), (x,))
            parts = [graph.call_function(operator.getitem, (linear, n)) for n in range(len(nodes))]
        for node, part in zip(nodes, parts, strict=True):
            node.replace_all_uses_with(part)
            graph.erase_node(node)


def attend_in(context: StepContext, layer: LayerAttention) -> Callable[..., torch.Tensor]:
    """A function that computes a layer's attention by the plan of the running step."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert context.plan is not None, "a forward outside of a step"
        return context.plan.attend(query, key, value, layer).contiguous()

    return attend


def _use_bindings(graph: fx.Graph) -> None:
    """Call operators by their Python bindings: `torch.mul` takes two thirds of the time of
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
