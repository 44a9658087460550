"""Keeps traced forwards for later starts: tracing takes seconds, reading a trace does not."""

import hashlib
import json
import logging
import operator
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_aggregate, map_arg
from transformers import PreTrainedModel

from infuse import adapters
from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.storage.scratch import scratch_folder
from infuse.server import engine
from infuse.server.engine.native.attention import LayerAttention, StepContext
from infuse.server.engine.native.forward.linear_sites import (
    innermost,
    linear_sites,
    siblings_of,
    width_of,
)
from infuse.server.engine.native.forward.tracing import (
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
    """The content of a file: a trace without weights, for any model of the same architecture."""

    nodes: Sequence[_Node]
    constants: Sequence[str | torch.Tensor]
    """The names of parameters and buffers; scalars themselves."""
    layers: Sequence[LayerAttention]


@dataclass(frozen=True, slots=True)
class _NodeBefore:
    """Stands for an earlier node in the arguments of a node."""

    number: int


class _Pickler(pickle.Pickler):
    """Pickles torch operators as their names."""

    def persistent_id(self, value: Any) -> str | None:
        return str(value) if isinstance(value, OpOverload) else None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: Any) -> OpOverload:
        return operator.attrgetter(name)(torch.ops)  # type: ignore[no-any-return]


def find_or_trace(
    ia3: IA3Slots, context: StepContext, forward: Forward, folder: Path | None
) -> TracedForward:
    """Trace a forward, or read the trace that an earlier start kept in `folder`. None: keep none.

    A trace that was read is compared with the modules as a new one is. Raises NotTraced.
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
    except Exception as error:  # A damaged file may raise anything.
        log.warning("A kept trace cannot be used; the model is traced again: %s", error)
    else:
        return traced
    traced = trace(ia3, context, forward)
    try:
        _write(folder, traced.trace, base)
    except Exception as error:  # A graph may hold what cannot be pickled.
        log.info("The trace is not kept; the next start traces again: %s", error)
    return traced


def sources() -> list[Path]:
    """Our source files that kept traces depend on: those of engine and adapters, with kernels."""
    folders = (Path(adapters.__file__).parent, Path(engine.__file__).parent)
    files = (file for folder in folders for file in folder.rglob("*"))
    return sorted(file for file in files if file.suffix in (".py", ".cpp", ".h"))


def key_of(base: PreTrainedModel, *more: str) -> str:
    """A cache key: a hash of the model's architecture, the versions, our own code, and `more`."""
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
    widths = json.dumps([_widths(site.layer) for site in linear_sites(base)])
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
    return Trace(_graph_of(kept.nodes), constants, list(linear_sites(base)), kept.layers)


def _write(folder: Path, trace: Trace, base: PreTrainedModel) -> None:
    """Write a trace, as a whole or not at all. Raises OSError, and ValueError if a constant has no
    name."""
    file = _file_in(folder, base)
    names = {id(tensor): name for name, tensor in _named(base)}
    constants = [names.get(id(each), each) for each in trace.constants]
    for each in constants:
        if isinstance(each, torch.Tensor) and each.dim():
            raise ValueError(f"it holds a tensor {list(each.shape)} that is no buffer of the model")
    folder.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder, ".tracing-") as part:
        whole = part / file.name
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
