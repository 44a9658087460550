"""IA3 on a base model: PEFT's calls, and a forward in which every row has its own adapter."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from adapters.bank import BASE_SLOT, AdapterBank, Segment
from adapters.checkpoint import AdapterVectors, effective_vectors, product, read_checkpoint
from adapters.errors import AdapterExists, NoFreeSlot, UnknownAdapter
from adapters.layer import IA3Layer, Scale, Wrapper
from adapters.saved_layer import Layout, SavedLayer, copy_of
from adapters.targets import BaseModules, Side, Target

BASE_NAME = "__base__"
"""The base model in a list of adapter names, as in PEFT's mixed batches."""
DEFAULT_SAVED_BYTES = 512 << 20

W = TypeVar("W", bound=Wrapper)


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

    def __init__(
        self,
        base: PreTrainedModel,
        max_adapters: int = 64,
        max_saved_bytes: int = DEFAULT_SAVED_BYTES,
    ) -> None:
        """`max_saved_bytes`: what the saved modules of a server's resident adapters may take."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.modules_of_base = BaseModules.of(base)
        self.bank = AdapterBank(self.modules_of_base, max_adapters, base.device)
        self.saved_capacity = max_saved_bytes
        self._layers: dict[str, IA3Layer] = {}
        self._saved: dict[str, SavedLayer] = {}
        self._wrapped: list[tuple[nn.Module, str, nn.Module]] = []
        """Whose attribute was replaced, which one, and what it was; the last one last."""
        self.changes = 0
        """How often a module of the base was wrapped, or all of them unwrapped."""
        self.scaled = 0
        """How often scales were set."""
        self._with_copies: set[int] = set()
        """Slots whose adapter has modules of its own."""
        self._scaled: dict[Target, Scale] = {}
        self._packed: tuple[object, ...] | None = None
        """The batch that the scales are set for, and the state of the bank then; no segments at
        all: a padded batch."""
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
        """Copy an adapter to the device; modules that it is the first to change are wrapped."""
        self._drop_copies(slot)
        self.bank.fill(slot, vectors)
        for target in vectors.vectors:
            if target.module not in self._layers:
                self._layers[target.module] = self._wrap(target.module, IA3Layer)
        if vectors.saved:
            self._with_copies.add(slot)
        for module, state in vectors.saved.items():
            if module not in self._saved:
                self._saved[module] = self._wrap(module, SavedLayer)
            skeleton = self.modules_of_base.skeleton.get_submodule(module)
            self._saved[module].copies[slot] = copy_of(skeleton, state, self.bank.device)

    def clear_slot(self, slot: int) -> None:
        """Forget a slot's adapter; no row may use the slot any more."""
        self.bank.clear(slot)
        self._drop_copies(slot)

    def has_copies(self, slots: Iterable[int]) -> bool:
        """Whether one of these slots' adapters has modules of its own."""
        return not self._with_copies.isdisjoint(slots)

    def _drop_copies(self, slot: int) -> None:
        if slot in self._with_copies:
            self._with_copies.remove(slot)
            for layer in self._saved.values():
                layer.drop(slot)

    def _wrap(self, name: str, kind: type[W]) -> W:
        parent, _, attribute = name.rpartition(".")
        owner = self.base.get_submodule(parent)
        while isinstance(owner, Wrapper):
            owner = owner.base_layer
        inner = getattr(owner, attribute)
        while isinstance(inner, Wrapper) and inner.outermost:
            owner, attribute, inner = inner, "base_layer", inner.base_layer
        layer = kind(inner)
        setattr(owner, attribute, layer)
        self._wrapped.append((owner, attribute, inner))
        self.changes += 1
        return layer

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
            self._packed = None
            scales = self.bank.packed(rows, segments)
            name = self.modules_of_base.output_embedding
            head = {target for target in self.bank.columns if target.module == name}
            if kept != segments and head:
                of_head = self.bank.packed(rows, kept, only=head)
                scales = {t: s for t, s in scales.items() if t not in head} | of_head
            self._set_scales(scales)
            if self._saved:
                self._set_copies(_by_token(rows, segments), _by_token(rows, kept))
            self._packed = packed

    def set_rows(self, slots: Sequence[int]) -> None:
        """For the next forwards: a `[batch, tokens]` batch whose row i uses `slots[i]`. Costs
        nothing while the batch stays as it is."""
        rows = (self.bank.fills, tuple(slots), None)
        if rows != self._packed:
            self._packed = None
            self._set_scales(self.bank.by_row(slots))
            self._set_copies(slots, flat=False)
            self._packed = rows

    def _set_copies(
        self, slots: Sequence[int], head_slots: Sequence[int] | None = None, *, flat: bool = True
    ) -> None:
        """The slot of each token or row; the LM head may see fewer."""
        device = self.bank.device
        layout = Layout(slots, self._with_copies, device, flat=flat)
        of_head = layout
        if head_slots is not None and head_slots != slots:
            of_head = Layout(head_slots, self._with_copies, device, flat=flat)
        for name, layer in self._saved.items():
            layer.use(of_head if name == self.modules_of_base.output_embedding else layout)

    def _set_scales(self, scales: dict[Target, Scale]) -> None:
        self._packed = None
        if scales == self._scaled:
            return  # A batch's own vectors are found by what the bank has written for it.
        self.scaled += 1
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
        for owner, attribute, module in reversed(self._wrapped):
            setattr(owner, attribute, module)
        self._wrapped.clear()
        self.changes += 1
        self._layers.clear()
        self._saved.clear()
        self._with_copies.clear()
        self._names.clear()
        self._active = ()
        self._product_slot = None
        # Its columns belong to modules that are no longer wrapped.
        self.bank = AdapterBank(self.modules_of_base, self.capacity, self.base.device)
        return self.base

    @contextmanager
    def by_row(self, names: Sequence[str]) -> Iterator[None]:
        """Within: row i of a `[batch, tokens]` batch uses adapter `names[i]`."""
        self.set_rows([self._slot(name) for name in names])
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
        slot = BASE_SLOT
        if self._enabled and len(self._active) == 1:
            slot = self._slot(self._active[0])
        elif self._enabled and self._active:
            slot = self._free_slot()
            several = [self._names[name][1] for name in self._active if name != BASE_NAME]
            self.fill_slot(slot, product(several))
            self._product_slot = slot
        self._set_scales(self.bank.uniform(slot))
        self._set_copies([slot])


def _by_token(rows: Sequence[int], segments: Sequence[Segment]) -> list[int]:
    """The slot of each token of a flat batch."""
    slots = list(rows)
    for segment in segments:
        slots += [segment.slot] * segment.tokens
    return slots
