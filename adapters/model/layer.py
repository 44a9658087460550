"""The layer around a target module: it scales the input, calls the module, scales the output."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

Piece = tuple[int, int, torch.Tensor]
"""Tokens `start:stop` of the flat axis, and their vector: `[size]` or `[stop - start, size]`."""


class ByToken(NamedTuple):
    """Each token's vector: its value j is `panels[j // width, entries[token], j % width]`."""

    panels: torch.Tensor
    """`[panels, entries, width]`."""
    entries: torch.Tensor
    """`[tokens]` or longer, int64: each token's entry."""
    size: int
    """The length of a vector; its last panel may be padded."""

    def vectors(self, tokens: int) -> torch.Tensor:
        """`[tokens, size]`."""
        panels = self.panels.index_select(1, self.entries[:tokens])
        return panels.transpose(0, 1).flatten(1)[:, : self.size]


class Scale:
    """How one tensor `[batch, tokens, size]` is rescaled.

    There is one factor for the whole tensor, of any shape that broadcasts against it; or a vector
    for each token; or pieces of the token axis, in its order, where a token in no piece keeps its
    value. Some models (OPT) flatten batch and tokens into one axis: `[batch * tokens, size]` is
    scaled alike. Factors are float32, and as in PEFT's `ia3.layer.Linear.forward` the product is
    computed in the wider type and rounded once.
    """

    __slots__ = ("_end", "_factor", "_mine", "_sizes", "_vectors", "by_token", "scratch")

    def __init__(
        self,
        factor: torch.Tensor | None = None,
        pieces: Sequence[Piece] = (),
        by_token: ByToken | None = None,
        scratch: "Scratch | None" = None,
    ) -> None:
        self._factor = factor
        self.by_token = by_token
        self.scratch = scratch
        self._vectors = [vector for *_, vector in pieces]
        self._sizes: list[int] = []
        """The lengths of the parts into which the pieces divide the first `_end` tokens."""
        self._mine: list[int] = []
        """The indices of the parts that are pieces."""
        self._end = 0
        for start, stop, _ in pieces:
            if start > self._end:
                self._sizes.append(start - self._end)
            self._mine.append(len(self._sizes))
            self._sizes.append(stop - start)
            self._end = stop

    def scale_(self, x: torch.Tensor) -> torch.Tensor:
        """Rescale `x` in place. Nothing else may read `x` afterwards."""
        factor = self._factor_of(x)
        if factor is not None:
            _by_row(x, factor).mul_(factor)
        elif self._vectors:
            parts = torch.split(x, [*self._sizes, x.shape[-2] - self._end], -2)
            # One call for all pieces: a long prompt batch has dozens, in each of its layers.
            torch._foreach_mul_([parts[part] for part in self._mine], self._vectors)
        return x

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        """Return a rescaled copy of `x`, in its dtype; in the scratch memory if there is one."""
        y = torch.empty_like(x) if self.scratch is None else self.scratch.like(x)
        factor = self._factor_of(x)
        if factor is None:
            return self.scale_(y.copy_(x))
        torch.mul(_by_row(x, factor), factor, out=_by_row(y, factor))
        return y

    def _factor_of(self, x: torch.Tensor) -> torch.Tensor | None:
        if self.by_token is not None:
            return self.by_token.vectors(x.shape[-2])
        if self._factor is not None and self._factor.dim() == 3 and x.dim() == 4:
            # Latent attention has an axis for heads here already.
            return self._factor[:, None]
        return self._factor


def _by_row(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return `x` with a batch axis, where the factor has one."""
    if x.dim() == 2 and factor.dim() == 3:
        return x.view(len(factor), -1, x.shape[-1])
    return x


class Scratch:
    """Memory for one rescaled input at a time, reused by all layers and steps.

    A fresh allocation of a megabyte costs as much in page faults as rescaling it does. A layer no
    longer needs the memory once its base layer has run.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Return uninitialised memory in the shape of `x`."""
        if self._memory.numel() < x.numel() or self._memory.dtype != x.dtype:
            # Not an inference tensor: later steps may run outside of inference mode.
            with torch.inference_mode(False):
                self._memory = torch.empty(x.numel(), dtype=x.dtype)
        return self._memory[: x.numel()].view(x.shape)


class Wrapper(nn.Module):
    """A module that replaces another one in the model, and calls it."""

    base_layer: nn.Module
    outermost = False
    """Whether a later wrapper goes between this one and its base layer."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        """The base layer's attributes are ours too: T5 reads `self.wo.weight.dtype`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


W = TypeVar("W", bound=Wrapper)


class Wrapping:
    """Wraps modules of a base model, and undoes it."""

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        """The owner, attribute and original module of each replacement, oldest first."""

    def wrap(self, name: str, make: Callable[[nn.Module], W]) -> W:
        """Replace a module by a wrapper around it. `name` is the module's in the unwrapped base."""
        parent, _, attribute = name.rpartition(".")
        owner = self._base.get_submodule(parent)
        while isinstance(owner, Wrapper):
            owner = owner.base_layer
        inner = getattr(owner, attribute)
        while isinstance(inner, Wrapper) and inner.outermost:
            owner, attribute, inner = inner, "base_layer", inner.base_layer
        layer = make(inner)
        setattr(owner, attribute, layer)
        self._replaced.append((owner, attribute, inner))
        return layer

    def undo(self) -> None:
        """Put every wrapped module back."""
        for owner, attribute, module in reversed(self._replaced):
            setattr(owner, attribute, module)
        self._replaced.clear()


class IA3Layer(Wrapper):
    """A target module of the base model whose input or output, or both, are rescaled.

    Output side (keys, values): `l * (W x + b)`. Input side (feed-forward): `W (l * x) + b`
    (T-Few, section 3.3). The layer knows no adapters: `IA3Slots` sets both scales, None for none.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.input_scale: Scale | None = None
        self.output_scale: Scale | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.around(self.base_layer, x, *args, **kwargs)

    def around(
        self,
        base: Callable[..., torch.Tensor],
        x: torch.Tensor,
        *args: Any,
        in_place: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Rescale around `base`, which computes what the base layer does. `in_place`: nothing else
        reads `x`."""
        if self.input_scale is not None:
            x = self.input_scale.scale_(x) if in_place else self.input_scale.scaled(x)
        y = base(x, *args, **kwargs)
        return y if self.output_scale is None else self.output_scale.scale_(y)
