"""Decoder blocks compiled: what lies between their linear layers and attention becomes a few
kernels.

Linear layers (packed, rescaled by adapters) and attention stay as they are: to the compiler each
is an opaque operator, told its place by a tensor. So blocks of a kind share one compiled function,
which takes seconds to make, and adapters come and go without another compilation.
"""

import itertools
import logging
import os
import re
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adapters.layer import Wrapper
from server.engine.attention import PLACE, StepContext, attend_at, attention_layers, run_probe
from server.engine.packing import PackedLinear, PackedSibling

log = logging.getLogger(__name__)

_CACHE = "TORCHINDUCTOR_CACHE_DIR"
_LINEAR = (nn.Linear, Conv1D, PackedLinear, PackedSibling)
_WARMED = (1, 2, 3)
"""Tokens: batches of one are compiled apart, and the third shows that all others are one."""

_MODULE = re.compile(r"_modules\['\w+'\]$")
"""Of a guard's name: a module of the block."""

_library = torch.library.Library("infuse", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "linear(Tensor x, Tensor place, int outputs, int stride) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor query, Tensor key, Tensor value, Tensor place, float scaling, int? window, "
    "float? softcap) -> Tensor"
)
_numbers = itertools.count()
_places: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()


def _new_place(module: nn.Module) -> torch.Tensor:
    number = next(_numbers)
    _places[number] = module
    return torch.tensor(number)


class Seam(Wrapper):
    """A linear layer in a compiled block: compiled code calls it by its place."""

    outermost = True

    def __init__(self, base_layer: nn.Module, outputs: int) -> None:
        super().__init__(base_layer)
        self.outputs = outputs
        self.siblings = base_layer.siblings if isinstance(base_layer, PackedSibling) else None
        self.stride = outputs if self.siblings is None else self.siblings.width
        """Between the rows of what it gives."""
        self.register_buffer("place", _new_place(self), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            y: torch.Tensor = torch.ops.infuse.linear(x, self.place, self.outputs, self.stride)
        else:
            y = self.base_layer(x)
        return y


def _strides(shape: torch.Size, stride: int) -> list[int]:
    """Of a tensor whose last axis lies in rows of `stride` elements."""
    strides = [1, stride]
    for size in reversed(shape[1:-1]):
        strides.append(strides[-1] * size)
    return list(reversed(strides[: len(shape)]))


def _linear(x: torch.Tensor, place: torch.Tensor, _outputs: int, stride: int) -> torch.Tensor:
    seam = _places[int(place)]
    assert isinstance(seam, Seam)
    if seam.siblings is not None:
        x = seam.siblings.same_input(x)
    y: torch.Tensor = seam.base_layer(x)
    if y.dim() > 1 and y.stride(-2) != stride:
        # An adapter's own module gives what its base layer gives, but lays it out in its own way.
        placed = y.new_empty_strided(y.shape, _strides(y.shape, stride))
        return placed.copy_(y)
    return y


def _linear_shape(x: torch.Tensor, _place: torch.Tensor, outputs: int, stride: int) -> torch.Tensor:
    shape = torch.Size((*x.shape[:-1], outputs))
    return x.new_empty_strided(shape, _strides(shape, stride))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    place: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    out = attend_at(_places[int(place)], query, key, value, scaling, window, softcap)
    return out.contiguous()


def _attend_shape(
    query: torch.Tensor, _key: torch.Tensor, value: torch.Tensor, *_: object
) -> torch.Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])


_library.impl("linear", _linear, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("infuse::linear", _linear_shape, lib=_library)
torch.library.register_fake("infuse::attend", _attend_shape, lib=_library)


def _tells_blocks_apart(guards: Sequence[Any]) -> list[bool]:
    """Of dynamo's `guard_filter_fn`: which conditions for taking a compiled function to check at
    each call. All of them would cost half a millisecond a block. Those that stay tell kinds of
    blocks and of batches apart, and notice an adapter that brings a module of its own."""
    return [
        guard.guard_type == "SHAPE_ENV"
        or (
            not guard.is_global
            and (
                (guard.guard_type == "TENSOR_MATCH" and not guard.name.startswith("self"))
                or guard.guard_type in ("CONSTANT_MATCH", "EQUALS_MATCH")
                or (guard.guard_type == "TYPE_MATCH" and _MODULE.search(guard.name) is not None)
            )
        )
        for guard in guards
    ]


_OPTIONS = {
    "guard_filter_fn": _tells_blocks_apart,
    # Kernels that bring threads of their own would fight oneDNN's for the cores.
    "cpp.threads": 1,
}


def compile_blocks(model: PreTrainedModel, context: StepContext, cache: Path) -> bool:
    """Compile a flat model's decoder blocks, now. False: they stay as they are, and a warning
    says why. What is compiled is kept in `cache`, for the next start."""
    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if not blocks:
        log.warning("Not compiled: %s does not name its blocks.", type(model).__name__)
        return False
    for block in blocks:
        _open_seams(block)
    ours = os.environ.setdefault(_CACHE, str(cache)) == str(cache)
    for fresh in (False, True):
        if fresh and ours:
            # What was kept may be damaged, and is made anew.
            shutil.rmtree(cache, ignore_errors=True)
        for block in blocks:
            block.compile(dynamic=True, options=_OPTIONS)
        try:
            for tokens in _WARMED:
                run_probe(model, context, tokens)
            return True
        except Exception as error:
            torch.compiler.reset()
            reason = str(error).strip().split("\n")[0]
    log.warning("The model's blocks do not compile and stay as they are: %s", reason)
    for block in blocks:
        block._compiled_call_impl = None
    return False


def _open_seams(block: nn.Module) -> None:
    for name, module in list(block.named_modules()):
        if isinstance(module, _LINEAR):
            outputs = module.nf if isinstance(module, Conv1D) else module.out_features
            block.set_submodule(name, Seam(module, int(outputs)))
    for layer in attention_layers(block):
        layer.register_buffer(PLACE, _new_place(layer), persistent=False)
