"""What lies between products and attention, compiled: a few kernels instead of many operators.

A traced forward is cut at its calls into our own code. What is between two of them is the same in
every block of a kind, so a model has a handful of different pieces, which take seconds to compile.
Adapters come and go without another compilation.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor import config as inductor
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_PREFIX = "piece_"

Piece = Callable[..., Any]


def compile_pieces(trace: fx.GraphModule, cache: Path) -> None:
    """Replace runs of torch's operators by compiled ones, now. What is compiled is kept in `cache`,
    for the next start. Raises whatever the compiler does."""
    # Importing the compiler sets the default, so that it cannot be told from a user's wish.
    if os.environ.get(_CACHE, default_cache_dir()) == default_cache_dir():
        os.environ[_CACHE] = str(cache)
    ours = os.environ[_CACHE] == str(cache)
    fuse_by_partitions(trace, [dict.fromkeys(run) for run in _runs(trace.graph)], _PREFIX)
    try:
        compiled = _compile_all(trace)
    except Exception:
        if not ours:
            raise
        # What was kept may be damaged, and is made anew.
        shutil.rmtree(cache, ignore_errors=True)
        compiled = _compile_all(trace)
    for node, piece in compiled.items():
        node.op, node.target = "call_function", piece


def _runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """Torch's operators that stand next to each other, where any of them computes."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        operator = node.target
        if isinstance(operator, torch._ops.OpOverload) and operator.namespace == "aten":
            if operator is not torch.ops.aten.sym_size.int:
                run.append(node)
        elif node.op == "call_function":
            if _computes(run):
                yield run
            run = []
    if _computes(run):
        yield run


def _computes(run: Sequence[fx.Node]) -> bool:
    """A view costs less than a call of what is compiled."""
    return not all(node.target.is_view for node in run)  # type: ignore[union-attr]


def _compile_all(trace: fx.GraphModule) -> dict[fx.Node, Piece]:
    """Equal pieces once."""
    pieces: dict[str, Piece] = {}
    compiled = {}
    for node in trace.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith(_PREFIX):
            module = trace.get_submodule(str(node.target))
            assert isinstance(module, fx.GraphModule)
            kind = _kind(module.graph)
            if kind not in pieces:
                pieces[kind] = _compile(module)
            compiled[node] = pieces[kind]
    return compiled


def _kind(graph: fx.Graph) -> str:
    """The same for graphs that differ in nothing but names."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}

    def numbered(value: Any) -> Any:
        return fx.map_arg(value, lambda node: f"%{numbers[node]}")

    lines = []
    for node in graph.nodes:
        what = _shape(node.meta["val"]) if node.op == "placeholder" else node.target
        lines.append(f"{node.op} {what} {numbered(node.args)} {numbered(node.kwargs)}")
    return "\n".join(lines)


def _shape(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return value


def _compile(module: fx.GraphModule) -> Piece:
    inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    single = not isinstance(_output(module.graph), (tuple, list))

    def run(*args: Any) -> Any:
        out = module(*args)
        return (out,) if single else out

    # Named, for what is kept of a piece holds for so many threads.
    with inductor.patch({"cpp.threads": torch.get_num_threads()}):
        decompositions = {**select_decomp_table(), torch.ops.aten.hypot.default: _hypot}
        functional = make_fx(
            torch.func.functionalize(run), decompositions, tracing_mode="symbolic"
        )(*inputs)
        compiled: Any = compile_fx_inner(functional, inputs)
    if single:
        return lambda *args: compiled(list(args))[0]
    return lambda *args: compiled(list(args))


def _hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Our norms'. Inductor would call the C library's for every few numbers of a row."""
    return torch.sqrt(x * x + y * y)


def _output(graph: fx.Graph) -> Any:
    return next(iter(reversed(graph.nodes))).args[0]
