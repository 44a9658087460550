"""The layer around a module that some adapters replace by their own copy (`modules_to_save`)."""

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from infuse.adapters.model.layer import Wrapper


class Layout:
    """Which slot each row of a `[batch, tokens]` batch uses, or each token of a flat one."""

    def __init__(
        self,
        slots: Sequence[int],
        interesting: Collection[int],
        device: torch.device,
        *,
        flat: bool,
    ) -> None:
        """`interesting`: the slots whose rows or tokens are noted."""
        self.flat = flat
        self.length = len(slots)
        self.index: dict[int, torch.Tensor | None] = {}
        """Slot -> its rows or tokens, `[n]`; None for all of them."""
        used = set(slots)
        for slot in used.intersection(interesting):
            if len(used) == 1:
                self.index[slot] = None
            else:
                mine = torch.tensor(slots) == slot
                self.index[slot] = mine.nonzero().flatten().to(device)


class SavedLayer(Wrapper):
    """A module of the base model, and adapters' own copies of it by slot.

    The copy computes the rows of its adapter, the base module all others, as PEFT's
    `ModulesToSaveWrapper` does. Where a copy's result is wider than the base's (an LM head with
    added tokens), the narrower rows end in -inf. A copy also replaces the base module's rescaling.
    """

    outermost = True

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copies: dict[int, nn.Module] = {}
        self._layout: Layout | None = None
        self._parts: list[tuple[nn.Module, torch.Tensor | None]] = []

    def use(self, layout: Layout) -> None:
        """Set which copies the next forwards use."""
        self._layout = layout
        self._parts = [
            (self.copies[slot], where)
            for slot, where in layout.index.items()
            if slot in self.copies
        ]

    def drop(self, slot: int) -> None:
        """Forget a slot's copy, where there is one."""
        if self.copies.pop(slot, None) is not None and self._layout is not None:
            self.use(self._layout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._parts:
            y: torch.Tensor = self.base_layer(x)
            return y
        assert self._layout is not None
        if self._layout.flat:
            # Some models (OPT) have no batch axis here.
            axis = 0 if x.is_floating_point() and x.dim() == 2 else 1
            return self._mixed(x, axis)
        rows = self._layout.length
        if x.is_floating_point() and x.dim() == 2:
            return self._mixed(x.view(rows, -1, x.shape[-1]), 0).flatten(0, 1)
        if len(x) == 1 < rows:
            # Positions may be the same tensor for all rows.
            x = x.expand(rows, *x.shape[1:])
        if len(x) > rows > 1:
            # Beams and returned sequences of a row lie next to each other.
            y = self._mixed(x.reshape(rows, -1, *x.shape[2:]), 0)
            return y.view(*x.shape[:2], *y.shape[2:])
        return self._mixed(x, 0)

    def _mixed(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        first, where = self._parts[0]
        if where is None:
            y: torch.Tensor = first(x)
            return y
        results = []
        safe = x if x.is_floating_point() else x.clone()
        for module, index in self._parts:
            assert index is not None
            results.append((index, module(x.index_select(axis, index))))
            if safe is not x:
                # The base's embeddings may not have these tokens.
                safe.index_fill_(axis, index, 0)
        y = self.base_layer(safe)
        width = max(y.shape[-1], *(result.shape[-1] for _, result in results))
        y = _widened(y, width)
        for index, result in results:
            y.index_copy_(axis, index, _widened(result, width))
        return y


def _widened(y: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(y, (0, width - y.shape[-1]), value=-torch.inf) if y.shape[-1] < width else y


def copy_of(
    skeleton: nn.Module, state: Mapping[str, torch.Tensor], device: torch.device
) -> nn.Module:
    """Return a copy of a module with these parameters and persistent buffers, on the device.

    Embeddings and LM heads may be of another size than the skeleton's.
    """
    module = copy.deepcopy(skeleton)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        is_parameter = leaf in dict(owner.named_parameters(recurse=False))
        value = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
        setattr(owner, leaf, value)
    return module.to(device)
