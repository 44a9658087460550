"""IA3 on a base model: PEFT's calls, and a forward in which every row has its own adapter."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from adapters.bank import BASE_SLOT, AdapterBank, Segment
from adapters.checkpoint import AdapterVectors, effective_vectors, product, read_checkpoint
from adapters.errors import AdapterExists, NoFreeSlot, UnknownAdapter
from adapters.layer import IA3Layer, Scale
from adapters.targets import BaseModules, Side, Target

BASE_NAME = "__base__"
"""The base model in a list of adapter names, as in PEFT's mixed batches."""


class IA3Model(nn.Module):
    """A causal language model with up to `max_adapters` IA3 adapters attached.

    As a library, adapters go by name::

        model = IA3Model(AutoModelForCausalLM.from_pretrained("…"))
        model.load_adapter("folder/saved/by/peft", "support")
        model.set_adapter("support")                       # every row
        model(input_ids, adapter_names=["support", "__base__"])   # each row its own

    A server keeps its own names and uses slots: `fill_slot`, then `set_packed` before a step.
    Inference only, and not thread-safe: one thread loads, sets and runs.
    """

    def __init__(self, base: PreTrainedModel, max_adapters: int = 64) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.modules_of_base = BaseModules.of(base)
        self.bank = AdapterBank(self.modules_of_base, max_adapters, base.device)
        self._layers: dict[str, IA3Layer] = {}
        self._scaled: dict[Target, Scale] = {}
        self._packed: tuple[object, ...] | None = None
        """The batch that the scales are set for, and the state of the bank then."""
        self._names: dict[str, tuple[int, AdapterVectors]] = {}
        self._active: tuple[str, ...] = ()
        self._product_slot: int | None = None
        self._enabled = True

    # Slots: what a server uses.

    @property
    def capacity(self) -> int:
        """How many adapters can be resident at once."""
        return self.bank.capacity

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None:
        """Copy an adapter's vectors to the device; modules it is first to adapt are wrapped."""
        self.bank.fill(slot, vectors)
        for target in vectors.vectors:
            if target.module not in self._layers:
                layer = IA3Layer(self.base.get_submodule(target.module))
                self.base.set_submodule(target.module, layer)
                self._layers[target.module] = layer

    def clear_slot(self, slot: int) -> None:
        self.bank.clear(slot)

    def set_packed(
        self,
        rows: Sequence[int],
        segments: Sequence[Segment] = (),
        kept: Sequence[Segment] | None = None,
    ) -> None:
        """For the next forwards: a flat `[1, tokens]` batch, a token for each slot in `rows`, then
        the segments. Costs nothing while the batch stays as it is.

        `kept`: what the LM head sees of the segments, where it does not see all of them
        (`logits_to_keep`). It sees all rows.
        """
        kept = segments if kept is None else kept
        packed = (self.bank.fills, tuple(rows), tuple(segments), tuple(kept))
        if packed != self._packed:
            scales = self.bank.packed(rows, segments)
            head = self.modules_of_base.output_embedding
            if kept != segments and any(target.module == head for target in self.bank.columns):
                scales = {t: scale for t, scale in scales.items() if t.module != head}
                of_kept = self.bank.packed(rows, kept).items()
                scales |= {t: scale for t, scale in of_kept if t.module == head}
            self._set_scales(scales)
            self._packed = packed

    def _set_scales(self, scales: dict[Target, Scale]) -> None:
        self._packed = None
        for target in self._scaled.keys() - scales.keys():
            self._set_scale(target, None)
        for target, scale in scales.items():
            self._set_scale(target, scale)
        self._scaled = scales

    def _set_scale(self, target: Target, scale: Scale | None) -> None:
        layer = self._layers[target.module]
        if target.side is Side.INPUT:
            layer.input_scale = scale
        else:
            layer.output_scale = scale

    # Names: what a notebook uses.

    @property
    def adapter_names(self) -> list[str]:
        return list(self._names)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Load what PEFT's `save_pretrained` wrote. The adapter is attached, not yet active.

        Raises InvalidAdapter, AdapterExists, NoFreeSlot.
        """
        self.add_adapter(
            name, effective_vectors(read_checkpoint(Path(folder)), self.modules_of_base)
        )

    def add_adapter(self, name: str, vectors: AdapterVectors) -> None:
        if name in self._names or name == BASE_NAME:
            raise AdapterExists(name)
        slot = self._free_slot()
        self.fill_slot(slot, vectors)
        self._names[name] = (slot, vectors)

    def set_adapter(self, name: str | Sequence[str]) -> None:
        """Make one adapter, or the product of several, active for every row.

        PEFT: `IA3Model.set_adapter`, on `PeftModel.base_model` for a list. A product takes a slot
        of its own: raises UnknownAdapter, NoFreeSlot.
        """
        names = (name,) if isinstance(name, str) else tuple(name)
        for each in names:
            self._slot(each)
        if len(names) > 1 and self._product_slot is None:
            self._free_slot()  # Refused before anything changes.
        self._active = names
        self._set_active()

    def delete_adapter(self, name: str) -> None:
        """Detach an adapter; the other active ones, or the base, stay active."""
        if name == BASE_NAME:
            raise UnknownAdapter(name)
        slot = self._slot(name)
        self._active = tuple(each for each in self._active if each != name)
        self._set_active()
        del self._names[name]
        self.clear_slot(slot)

    def disable_adapter_layers(self) -> None:
        self._enabled = False
        self._set_active()

    def enable_adapter_layers(self) -> None:
        self._enabled = True
        self._set_active()

    def unload(self) -> PreTrainedModel:
        """The base model as it was before any adapter was attached."""
        self._set_scales({})
        for name, layer in self._layers.items():
            self.base.set_submodule(name, layer.base_layer)
        self._layers.clear()
        self._names.clear()
        self._active = ()
        self._product_slot = None
        # Its columns belong to modules that are no longer wrapped.
        self.bank = AdapterBank(self.modules_of_base, self.capacity, self.base.device)
        return self.base

    @contextmanager
    def by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Within: row i of a `[batch, tokens]` batch uses adapter `names[i]`."""
        slots = [self._slot(name) for name in names]
        self.bank.reserve_rows(len(slots))
        self._set_scales(self.bank.by_row(slots))
        try:
            yield
        finally:
            self._set_active()

    @contextmanager
    def by_segment(self, segments: Sequence[tuple[str, int]]) -> Iterator[None]:
        """Within: the next `tokens` tokens of a packed `[1, tokens]` row use adapter `name`."""
        self.set_packed([], [Segment(self._slot(name), tokens) for name, tokens in segments])
        try:
            yield
        finally:
            self._set_active()

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward. With `adapter_names`, row i uses the i-th adapter
        ("__base__": none), as in PEFT's mixed batches."""
        if adapter_names is None:
            return self.base(*args, **kwargs)
        with self.by_row(adapter_names):
            return self.base(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base model's `generate`, with `adapter_names` as in `forward`."""
        generate = cast(Callable[..., torch.Tensor], self.base.generate)
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self.by_row(adapter_names):
            return generate(*args, **kwargs)

    def _slot(self, name: str) -> int:
        if name == BASE_NAME:
            return BASE_SLOT
        if name not in self._names:
            raise UnknownAdapter(name)
        return self._names[name][0]

    def _free_slot(self) -> int:
        taken = {slot for slot, _ in self._names.values()} | {self._product_slot}
        for slot in range(BASE_SLOT + 1, self.capacity + 1):
            if slot not in taken:
                return slot
        raise NoFreeSlot(self.capacity)

    def _set_active(self) -> None:
        if self._product_slot is not None:
            self.clear_slot(self._product_slot)
            self._product_slot = None
        if not self._enabled or not self._active:
            self._set_scales({})
        elif len(self._active) == 1:
            self._set_scales(self.bank.uniform(self._slot(self._active[0])))
        else:
            slot = self._free_slot()
            several = [self._names[name][1] for name in self._active if name != BASE_NAME]
            self.fill_slot(slot, product(several))
            self._product_slot = slot
            self._set_scales(self.bank.uniform(slot))
