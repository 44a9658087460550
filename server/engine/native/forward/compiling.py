"""A traced forward as one compiled function, which runs without Python and its lock.

Inductor fuses what lies between products and attention, and writes the calls of all of it in C++.
Products and attention are our kernels where there are some, and come back to Python where not.
Adapters come and go without another compilation.
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

from adapters.model.slots import IA3Slots, Version
from server.engine.native.attention import AttentionPlan, Chunk, StepContext
from server.engine.native.cache.kv_cache import FlatCache
from server.engine.native.cache.strip_attention import StripPlan
from server.engine.native.forward.seams import Product
from server.engine.native.forward.tracing import (
    Forward,
    NotTraced,
    TracedForward,
    attend_in,
    check_alike,
    probing,
    traced_example,
)
from server.engine.native.kernels.attention import AttentionCall
from server.engine.native.kernels.operators import ATTEND, ATTENTION, LINEAR, PRODUCT, library
from server.engine.native.kernels.product import ProductCall

log = logging.getLogger(__name__)

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_ERROR = 1e-4
_ROUNDINGS = 8
"""What compiled logits may be off, of the greatest: kernels add up in another order; and what is
fused is not rounded to the model's dtype on the way."""


class CompiledForward:
    """A compiled forward. A batch that its kernels cannot rescale runs as it was traced."""

    def __init__(
        self, ia3: IA3Slots, context: StepContext, cache: FlatCache, traced: TracedForward
    ) -> None:
        self._ia3 = ia3
        self._context = context
        self.traced = traced
        self._graph = traced.trace.opened()
        _move_gates(self._graph)
        _open_hypots(self._graph)
        self._products: list[Product] = []
        """The operators without a kernel name these by their numbers."""
        self._kernels: list[tuple[Product, ProductCall]] = []
        self._attentions: list[AttentionCall] = []
        addresses = self._use_operators(cache)
        calls = torch.tensor(addresses, dtype=torch.int64, device=ia3.base.device)
        self._constants = [calls, *traced.trace.constants]
        self._rescaled_for: Version | None = None
        self._can_rescale = True
        self._run: Callable[..., Any]

    @property
    def has_attention(self) -> bool:
        """Whether kernels attend: in memory that a plan of strips knows."""
        return bool(self._attentions)

    def compile(self, folder: Path) -> None:
        """What is compiled is kept in `folder`, for the next start. Raises whatever the compiler
        does."""
        # Importing the compiler sets the default, so that it cannot be told from a user's wish.
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
            # What was kept may be damaged, and is made anew.
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
            assert isinstance(plan, StripPlan), "kernels attend to what lies in strips"
            plan.begin()
        try:
            with _running_as(self):
                logits: torch.Tensor = self._run(*self._constants, ids, positions, keep)
        except RuntimeError as error:
            # It does not say what failed, want of memory say; as it was traced it does.
            log.warning("A compiled step failed and runs again uncompiled: %s", error)
            return self.traced(ids, positions, keep)
        return logits

    def linear(self, x: torch.Tensor, number: int) -> torch.Tensor:
        return self._products[number].joined(x)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, number: int
    ) -> torch.Tensor:
        attend = attend_in(self._context, self.traced.trace.layers[number])
        return attend(query, key, value)

    def _rescale(self) -> None:
        self._can_rescale = True
        for product, call in self._kernels:
            scales = product.scales()
            if scales is None:
                self._can_rescale = False
                return
            call.rescale(scales)

    def _use_operators(self, cache: FlatCache) -> list[int]:
        """Calls of operators instead of products and attention; and the addresses that kernels'
        operators find by their numbers."""
        with self._graph.inserting_before(next(iter(self._graph.nodes))):
            calls = self._graph.placeholder("calls")
        addresses: list[int] = []
        for node in list(self._graph.nodes):
            if isinstance(node.target, Product):
                self._use_product(node, calls, addresses)
            elif node.target is ATTEND:
                *tensors, number = node.args
                call = cache.attention_call(self.traced.trace.layers[number])
                if call is not None:
                    node.target, node.args = ATTENTION, (*tensors, calls, len(addresses))
                    self._attentions.append(call)
                    addresses.append(call.address)
        return addresses

    def _use_product(self, node: fx.Node, calls: fx.Node, addresses: list[int]) -> None:
        product, [x] = node.target, node.args
        assert isinstance(product, Product)
        kernel, columns = product.kernel, product.columns
        outputs = columns[-1].stop
        if kernel is None:
            node.target, node.args = LINEAR, (x, len(self._products), outputs, outputs)
            product.owns_input = False  # What is equal may be computed once for several readers.
            self._products.append(product)
        else:
            call = ProductCall(kernel)
            node.target = PRODUCT
            node.args = (x, calls, len(addresses), outputs, product.gates)
            self._kernels.append((product, call))
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
    """What `traced` was made of, compiled; `folder`: see `compile`.

    Raises NotTraced where that cannot be, or gives anything else on an example.
    """
    try:
        compiled = CompiledForward(ia3, context, cache, traced)
        compiled.compile(folder)
        tolerance = max(_ERROR, _ROUNDINGS * torch.finfo(ia3.base.dtype).eps)
        with _planned(cache, compiled.has_attention) as plan:
            check_alike(context, modules, compiled, ia3.base.device, plan, tolerance)
    except Exception as error:  # Whatever the compiler does.
        raise NotTraced(str(error).strip().split("\n")[0]) from error
    return compiled


@contextmanager
def _planned(cache: FlatCache, in_cache: bool) -> Iterator[Callable[[int], AttentionPlan]]:
    """Plans for a few tokens of a row that lives within."""
    if not in_cache:
        yield probing
        return
    row = -1
    has_room = cache.reserve(row, 16)
    assert has_room, "the cache is new"
    try:
        yield lambda tokens: cache.plan([], [Chunk(row, 0, tokens)])
    finally:
        cache.release(row)


def _compile(module: fx.GraphModule, inputs: list[InputType]) -> Callable[..., Any]:
    """`inputs`: fakes, as `_fakes` makes them."""
    last = inputs[-1]
    assert isinstance(last, FakeTensor)
    options = {
        "cpp_wrapper": last.device.type == "cpu",
        # The calls are not worth the optimising that the arithmetic is: half of the time.
        "cpp_wrapper_build_separate": True,
        # Named, for what is kept holds for so many.
        "cpp.threads": torch.get_num_threads(),
        # What is fused is rounded as it is operator by operator.
        "emulate_precision_casts": True,
        # 150 MB in a folder of its own, to compile one file.
        "cpp_cache_precompile_headers": False,
    }
    # Around all of it: what is found in the compiler's cache is loaded by these, too.
    with inductor.patch(options), tracing(TracingContext(last.fake_mode)), torch.no_grad():
        return standalone_compile(module, inputs, dynamic_shapes="from_tracing_context", aot=True)


def _fakes(constants: Sequence[torch.Tensor], example: Sequence[torch.Tensor]) -> list[InputType]:
    """Fakes of `constants`, which keep their sizes, and of `example`, whose sizes may be any."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    return [
        *(mode.from_tensor(each, static_shapes=True) for each in constants),
        *(mode.from_tensor(each, static_shapes=False) for each in example),
    ]


def _open_hypots(graph: fx.Graph) -> None:
    """Our norms'. Inductor would call the C library's for every few numbers of a row."""
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.hypot.default:
            with graph.inserting_before(node):
                squares = [graph.call_function(aten.mul.Tensor, (x, x)) for x in node.args]
                total = graph.call_function(aten.add.Tensor, tuple(squares))
                root = graph.call_function(aten.sqrt.default, (total,))
            node.replace_all_uses_with(root)
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
        result.replace_all_uses_with(product)
        for node in (result, activated, gate, up):
            graph.erase_node(node)


_running: ContextVar[CompiledForward] = ContextVar("running")
"""The forward whose operators call back."""


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
