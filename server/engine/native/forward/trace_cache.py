"""Traced forwards, kept for later starts: tracing takes seconds, reading a trace does not."""

import hashlib
import json
import logging
import operator
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate, map_arg
from transformers import PreTrainedModel

import adapters
import server.engine
from adapters.model.slots import IA3Slots
from server.engine.native.attention import LayerAttention, StepContext
from server.engine.native.forward.seams import innermost, seams_of, siblings_of, width_of
from server.engine.native.forward.tracing import (
    Forward,
    Trace,
    TracedForward,
    check_alike,
    check_traceable,
    trace,
)

log = logging.getLogger(__name__)


_Node = tuple[str, Any, Any, Any, str]
"""A graph's node: operation, target, arguments, named arguments, name."""


@dataclass(frozen=True)
class _Kept:
    """A trace without the model's weights: it fits each model of its kind."""

    nodes: Sequence[_Node]
    constants: Sequence[str | torch.Tensor]
    """Names of parameters and buffers; a number as it is."""
    layers: Sequence[LayerAttention]


@dataclass(frozen=True, slots=True)
class _NodeBefore:
    """An earlier node, among the arguments of another."""

    number: int


class _Pickler(pickle.Pickler):
    """Knows operators of torch by their names."""

    def persistent_id(self, value: Any) -> str | None:
        return str(value) if isinstance(value, OpOverload) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: Any) -> OpOverload:
        return operator.attrgetter(name)(torch.ops)  # type: ignore[no-any-return]


def find_or_trace(
    ia3: IA3Slots, context: StepContext, forward: Forward, folder: Path | None
) -> TracedForward:
    """`trace`, or what it gave at an earlier start that kept it in `folder`; None: nothing is kept.

    What was kept must give what the modules give, as a new trace must. Raises NotTraced.
    """
    base = ia3.base
    if folder is None:
        return trace(ia3, context, forward)
    check_traceable(base)
    try:
        traced = TracedForward(ia3, context, _read(folder, base))
        check_alike(context, forward, traced, base.device)
    except FileNotFoundError:
        pass
    except Exception as error:  # Whatever a file can say.
        log.warning("A kept trace is of no use, and is made anew: %s", error)
    else:
        return traced
    traced = trace(ia3, context, forward)
    try:
        _write(folder, traced.trace, base)
    except Exception as error:  # Whatever a graph may hold; the next start traces again.
        log.info("The trace is not kept: %s", error)
    return traced


def sources() -> list[Path]:
    """The files of our own that what is kept depends on: those of the engine and of the adapters,
    kernels included."""
    folders = (Path(adapters.__file__).parent, Path(server.engine.__file__).parent)
    files = (file for folder in folders for file in folder.rglob("*"))
    return sorted(file for file in files if file.suffix in (".py", ".cpp", ".h"))


def key_of(base: PreTrainedModel, *more: str) -> str:
    """A name for all that follows from a model's kind, our own code, and `more`."""
    parts = [
        torch.__version__,
        transformers.__version__,
        base.config.to_json_string(use_diff=False),
        repr(base),
        json.dumps([[name, *map(str, (t.shape, t.dtype, t.device))] for name, t in _named(base)]),
        *more,
        *(file.read_text() for file in sources()),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _file_in(folder: Path, base: PreTrainedModel) -> Path:
    widths = json.dumps([_widths(seam.layer) for seam in seams_of(base)])
    return folder / f"{key_of(base, widths)}.pickle"


def _widths(layer: torch.nn.Module) -> list[int]:
    siblings = siblings_of(layer)
    return [width_of(innermost(layer))] if siblings is None else list(siblings.widths)


def _named(base: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    return list(chain(base.named_parameters(), base.named_buffers()))


def _read(folder: Path, base: PreTrainedModel) -> Trace:
    with _file_in(folder, base).open("rb") as opened:
        kept = _Unpickler(opened).load()
    assert isinstance(kept, _Kept)
    named = dict(_named(base))
    constants = [named[each] if isinstance(each, str) else each for each in kept.constants]
    return Trace(_graph_of(kept.nodes), constants, list(seams_of(base)), kept.layers)


def _write(folder: Path, trace: Trace, base: PreTrainedModel) -> None:
    """Whole or not at all. Raises ValueError where a constant has no name, and OSError."""
    file = _file_in(folder, base)
    names = {id(tensor): name for name, tensor in _named(base)}
    constants = [names.get(id(each), each) for each in trace.constants]
    for each in constants:
        if isinstance(each, torch.Tensor) and each.dim():
            raise ValueError(f"it holds a tensor {list(each.shape)} that is no buffer of the model")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as part:
        whole = Path(part, file.name)
        with whole.open("wb") as opened:
            _Pickler(opened).dump(_Kept(_nodes_of(trace.graph), constants, trace.layers))
        whole.replace(file)


def _nodes_of(graph: fx.Graph) -> list[_Node]:
    numbers: dict[fx.Node, Any] = {
        node: _NodeBefore(number) for number, node in enumerate(graph.nodes)
    }
    return [
        (
            node.op,
            node.target,
            map_arg(node.args, numbers.__getitem__),
            map_arg(node.kwargs, numbers.__getitem__),
            node.name,
        )
        for node in graph.nodes
    ]


def _graph_of(nodes: Sequence[_Node]) -> fx.Graph:
    graph = fx.Graph()
    made: list[fx.Node] = []

    def before(argument: Any) -> Any:
        return made[argument.number] if isinstance(argument, _NodeBefore) else argument

    for op, target, args, kwargs, name in nodes:
        args, kwargs = map_aggregate(args, before), map_aggregate(kwargs, before)
        made.append(graph.create_node(op, target, args, kwargs, name))
    return graph
