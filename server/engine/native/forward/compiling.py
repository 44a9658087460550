"""Compiles a traced forward to one function, which runs without Python and so without the GIL.

Inductor fuses the operators between linear layers and attention, and calls all of them from C++.
Linear layers and attention run by our kernels, or call back to Python if they have none. Adapters
come and go without another compilation.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor
from torch._inductor import standalone_compile
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.utils import InputType
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from infuse.adapters.model.slots import IA3Slots, Version
from infuse.server.engine.native.attention import AttentionPlan, Chunk, StepContext
from infuse.server.engine.native.cache.kv_cache import FlatCache
from infuse.server.engine.native.cache.strip_attention import StripPlan
from infuse.server.engine.native.forward.linear_sites import TracedLinear
from infuse.server.engine.native.forward.tracing import (
    Forward,
    NotTraced,
    TracedForward,
    attend_in,
    check_alike,
    probing,
    traced_example,
)
from infuse.server.engine.native.kernels.attention import AttentionCall
from infuse.server.engine.native.kernels.linear import LinearCall
from infuse.server.engine.native.kernels.operators import (
    ATTEND,
    KERNEL_ATTEND,
    KERNEL_LINEAR,
    LINEAR,
    library,
)

log = logging.getLogger(__name__)

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_ERROR = 1e-4
_ROUNDINGS = 8
"""How far compiled logits may differ, as a share of the greatest and in roundings of the dtype:
kernels sum in another order, and fused operators do not round intermediate results."""


class CompiledForward:
    """A compiled forward. Batches that its kernels cannot rescale run by the traced forward."""

    def __init__(
        self, ia3: IA3Slots, context: StepContext, cache: FlatCache, traced: TracedForward
    ) -> None:
        self._ia3 = ia3
        self._context = context
        self.traced = traced
        self._graph = traced.trace.with_linears()
        _fuse_gates(self._graph)
        _expand_hypots(self._graph)
        self._linears: list[TracedLinear] = []
        """Linear layers without a kernel. Their operators know them by index."""
        self._kernel_linears: list[tuple[TracedLinear, LinearCall]] = []
        self._attentions: list[AttentionCall] = []
        addresses = self._use_operators(cache)
        calls = torch.tensor(addresses, dtype=torch.int64, device=ia3.base.device)
        self._constants = [calls, *traced.trace.constants]
        self._rescaled_for: Version | None = None
        self._can_rescale = True
        self._run: Callable[..., Any]

    @property
    def has_attention(self) -> bool:
        """Whether kernels compute attention, which they do over strips only."""
        return bool(self._attentions)

    def compile(self, folder: Path) -> None:
        """Compile, and keep the result in `folder` for the next start. The compiler may raise any
        exception."""
        # Importing the compiler sets the variable, so its default counts as not set by the user.
        if os.environ.get(_CACHE, default_cache_dir()) == default_cache_dir():
            os.environ[_CACHE] = str(folder)
        ours = os.environ[_CACHE] == str(folder)
        graph_module = fx.GraphModule({}, self._graph)
        inputs = _fakes(self._constants, traced_example(self._ia3.base.device))
        try:
            self._run = _compile(graph_module, inputs)
        except Exception:
            if not ours:
                raise
            # A kept file may be damaged: delete all of them and compile again.
            shutil.rmtree(folder, ignore_errors=True)
            self._run = _compile(graph_module, inputs)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        version = self._ia3.version
        if version != self._rescaled_for:
            self._rescale()
            self._rescaled_for = version
        if not self._can_rescale:
            return self.traced(ids, positions, keep)
        plan = self._context.plan
        if self.has_attention:
            assert isinstance(plan, StripPlan), "kernels attend over strips"
            plan.bind_kernels()
        try:
            with _running_as(self):
                logits: torch.Tensor = self._run(*self._constants, ids, positions, keep)
        except RuntimeError as error:
            # The error does not say what failed (memory, for example); the traced forward's does.
            log.warning("A compiled step failed and runs again uncompiled: %s", error)
            return self.traced(ids, positions, keep)
        return logits

    def linear(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self._linears[number].joined(x)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: int
    ) -> torch.Tensor:
        attend = attend_in(self._context, self.traced.trace.layers[number])
        return attend(query, key, value)

    def _rescale(self) -> None:
        self._can_rescale = True
        for linear, call in self._kernel_linears:
            scales = linear.scales()
            if scales is None:
                self._can_rescale = False
                return
            call.rescale(scales)

    def _use_operators(self, cache: FlatCache) -> list[int]:
        """Replace linear layers and attention in the graph by operators. Returns the addresses of
        the kernels' calls, which the operators know by index."""
        with self._graph.inserting_before(next(iter(self._graph.nodes))):
            calls = self._graph.placeholder("calls")
        addresses: list[int] = []
        for node in list(self._graph.nodes):
            if isinstance(node.target, TracedLinear):
                self._use_linear(node, calls, addresses)
            elif node.target is ATTEND:
                *tensors, number = node.args
                call = cache.attention_call(self.traced.trace.layers[number])
                if call is not None:
                    node.target, node.args = KERNEL_ATTEND, (*tensors, calls, len(addresses))
                    self._attentions.append(call)
                    addresses.append(call.address)
        return addresses

    def _use_linear(self, node: fx.Node, calls: fx.Node, addresses: list[int]) -> None:
        linear, [x] = node.target, node.args
        assert isinstance(linear, TracedLinear)
        kernel, columns = linear.kernel, linear.columns
        outputs = columns[-1].stop
        if kernel is None:
            node.target, node.args = LINEAR, (x, len(self._linears), outputs, outputs)
            linear.owns_input = False  # Inductor may compute equal inputs once.
            self._linears.append(linear)
        else:
            call = LinearCall(kernel)
            node.target = KERNEL_LINEAR
            node.args = (x, calls, len(addresses), outputs, linear.gates)
            self._kernel_linears.append((linear, call))
            addresses.append(call.address)
        if len(columns) > 1:
            for part in list(node.users):
                mine = columns[part.args[1]]  # type: ignore[index]
                part.target = torch.ops.aten.slice.Tensor
                part.args = (node, -1, mine.start, mine.stop)


def compile_forward(
    ia3: IA3Slots,
    context: StepContext,
    modules: Forward,
    traced: TracedForward,
    cache: FlatCache,
    folder: Path,
) -> CompiledForward:
    """Compile a traced forward. The result is kept in `folder` for the next start.

    Raises NotTraced if it cannot be compiled, or gives other logits on an example.
    """
    try:
        compiled = CompiledForward(ia3, context, cache, traced)
        compiled.compile(folder)
        tolerance = max(_ERROR, _ROUNDINGS * torch.finfo(ia3.base.dtype).eps)
        with _planned(cache, compiled.has_attention) as plan:
            check_alike(context, modules, compiled, ia3.base.device, plan, tolerance)
    except Exception as error:  # The compiler may raise anything.
        raise NotTraced(str(error).strip().split("\n")[0]) from error
    return compiled


@contextmanager
def _planned(cache: FlatCache, in_cache: bool) -> Iterator[Callable[[int], AttentionPlan]]:
    """Plan the attention of examples: by a probe, or on a temporary sequence in the cache."""
    if not in_cache:
        yield probing
        return
    seq_id = -1
    has_room = cache.reserve(seq_id, 16)
    assert has_room, "the cache is new"
    try:
        yield lambda tokens: cache.plan([], [Chunk(seq_id=seq_id, start=0, tokens=tokens)])
    finally:
        cache.release(seq_id)


def _compile(module: fx.GraphModule, inputs: list[InputType]) -> Callable[..., Any]:
    """Compile a graph for these fake inputs; see `_fakes`."""
    last = inputs[-1]
    assert isinstance(last, FakeTensor)
    options = {
        "cpp_wrapper": last.device.type == "cpu",
        # Compile the calls without the arithmetic's optimisations: that saves half of the time.
        "cpp_wrapper_build_separate": True,
        # Part of the cache key: compiled code depends on the number of threads.
        "cpp.threads": torch.get_num_threads(),
        # Round intermediate results in fused code as separate operators do.
        "emulate_precision_casts": True,
        # Precompiled headers take 150 MB, to compile one file.
        "cpp_cache_precompile_headers": False,
    }
    # The options must also be set while a result is loaded from the compiler's cache.
    with inductor.patch(options), tracing(TracingContext(last.fake_mode)), torch.no_grad():
        return standalone_compile(module, inputs, dynamic_shapes="from_tracing_context", aot=True)


def _fakes(constants: Sequence[torch.Tensor], example: Sequence[torch.Tensor]) -> list[InputType]:
    """Fake tensors of `constants`, with static sizes, and of `example`, with dynamic sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [
        *(mode.from_tensor(each, static_shapes=True) for each in constants),
        *(mode.from_tensor(each, static_shapes=False) for each in example),
    ]


def _expand_hypots(graph: fx.Graph) -> None:
    """Replace `hypot` (of our norms) by arithmetic. Inductor would call the C library for it."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.hypot.default:
            with graph.inserting_before(node):
                squares = [graph.call_function(aten.mul.Tensor, (x, x)) for x in node.args]
                total = graph.call_function(aten.add.Tensor, tuple(squares))
                root = graph.call_function(aten.sqrt.default, (total,))
            node.replace_all_uses_with(root)
            graph.erase_node(node)


def _fuse_gates(graph: fx.Graph) -> None:
    """Let kernels compute `silu(first) * second` where nothing else reads two packed layers.

    If one linear layer alone reads the result, the kernel applies that layer's input scale too.
    """
    for linear in list(graph.nodes):
        if not isinstance(linear.target, TracedLinear) or not linear.target.can_gate:
            continue
        gate, up = linear.users
        if len(gate.users) != 1 or len(up.users) != 1:
            continue
        [activated], [result] = gate.users, up.users
        is_silu = activated.target is torch.ops.aten.silu.default and len(activated.users) == 1
        multiplies = result.target is torch.ops.aten.mul.Tensor
        if not is_silu or not multiplies or set(result.args) != {activated, up}:
            continue
        readers = [reader.target for reader in result.users]
        alone = len(readers) == 1 and isinstance(readers[0], TracedLinear)
        linear.target.gate(readers[0] if alone else None)
        result.replace_all_uses_with(linear)
        for node in (result, activated, gate, up):
            graph.erase_node(node)


_running: ContextVar[CompiledForward] = ContextVar("running")
"""The forward that is running, to which its operators call back."""


@contextmanager
def _running_as(forward: CompiledForward) -> Iterator[None]:
    token = _running.set(forward)
    try:
        yield
    finally:
        _running.reset(token)


def _linear(x: torch.Tensor, number: int, _outputs: int, _stride: int) -> torch.Tensor:
    return _running.get().linear(x, number)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: int
) -> torch.Tensor:
    return _running.get().attend(query, key, value, number)


library.impl("linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
