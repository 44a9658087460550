"""IA3 by slots: in one forward of the base, every row and segment has its own adapter."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import BaseModules, Side, Target
from infuse.adapters.errors import Fault, InvalidAdapter
from infuse.adapters.model.bank import AdapterBank, Segment
from infuse.adapters.model.layer import IA3Layer, Scale, Wrapping
from infuse.adapters.model.saved_layer import Layout, SavedLayer, copy_of

DEFAULT_SAVED_BYTES = 512 << 20


class Version(NamedTuple):
    """What a forward was prepared for: what was made for another version is made again."""

    layers: int
    """Differs once a module of the base was wrapped, or all of them were unwrapped."""
    scales: int
    """Differs once other scales were set."""
    columns: int
    """Differs once the bank has new columns."""


class IA3Slots:
    """A base model with up to `max_adapters` IA3 adapters on the device: what a server calls.

    A server keeps its own names and fills slots: `fill_slot`, then `set_packed` or `set_rows`
    before a forward of `base`. Inference only, and not thread-safe: one thread fills, sets and
    runs. `infuse.adapters.model.model.IA3Model` is what a notebook calls.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        max_adapters: int = 64,
        max_saved_bytes: int = DEFAULT_SAVED_BYTES,
    ) -> None:
        """`max_saved_bytes`: how many bytes the whole modules of resident adapters may take."""
        self.base = base.requires_grad_(False)
        self.modules_of_base = BaseModules.of(base)
        self.bank = AdapterBank(self.modules_of_base, max_adapters, base.device)
        self.saved_capacity = max_saved_bytes
        self._layers: dict[str, IA3Layer] = {}
        self._saved: dict[str, SavedLayer] = {}
        self._wrapping = Wrapping(base)
        self._layers_version = 0
        self._scales_version = 0
        self._with_copies: set[int] = set()
        """Slots whose adapter brings whole modules."""
        self._scaled: dict[Target, Scale] = {}
        self._packed: tuple[object, ...] | None = None
        """The batch that scales are set for, and the bank's version then. A padded batch has None
        for its segments."""

    @property
    def capacity(self) -> int:
        """How many adapters can be resident at once."""
        return self.bank.capacity

    @property
    def version(self) -> Version:
        return Version(self._layers_version, self._scales_version, self.bank.column_count)

    def check(self, vectors: AdapterVectors) -> None:
        """Raises InvalidAdapter where an adapter's whole modules take more than there is room."""
        needed = vectors.saved_bytes
        if needed > self.saved_capacity:
            problem = f"take {needed} bytes, and this server has room for {self.saved_capacity}"
            fix = "raise max-saved-module-bytes, or train with fewer or smaller modules_to_save"
            raise InvalidAdapter([Fault("modules_to_save", problem, fix)])

    def fill_slot(self, slot: int, vectors: AdapterVectors) -> None:
        """Copy an adapter to the device; modules that it is the first to change are wrapped."""
        skeleton = self.modules_of_base.skeleton
        # First the copies, which may not fit in memory: then the slot stays as it was.
        copies = {
            module: copy_of(skeleton.get_submodule(module), state, self.bank.device)
            for module, state in vectors.saved.items()
        }
        self._drop_copies(slot)
        self.bank.fill(slot, vectors)
        for target in vectors.vectors:
            if target.module not in self._layers:
                self._layers[target.module] = self._wrapping.wrap(target.module, IA3Layer)
                self._layers_version += 1
        if copies:
            self._with_copies.add(slot)
        for module, copy in copies.items():
            if module not in self._saved:
                self._saved[module] = self._wrapping.wrap(module, SavedLayer)
                self._layers_version += 1
            self._saved[module].copies[slot] = copy

    def clear_slot(self, slot: int) -> None:
        """Forget a slot's adapter; no row may use the slot any more."""
        self.bank.clear(slot)
        self._drop_copies(slot)

    def has_copies(self, slots: Iterable[int]) -> bool:
        """Whether one of these slots' adapters brings whole modules."""
        return not self._with_copies.isdisjoint(slots)

    def _drop_copies(self, slot: int) -> None:
        if slot in self._with_copies:
            self._with_copies.remove(slot)
            for layer in self._saved.values():
                layer.drop(slot)

    def set_packed(
        self,
        slots: Sequence[int],
        segments: Sequence[Segment] = (),
        kept: Sequence[Segment] | None = None,
    ) -> None:
        """Set the batch of the next forwards: flat `[1, tokens]`, a token for each batch row, whose
        slots are `slots`, then the segments. Costs nothing while the batch stays as it is.

        `kept`: the part of the segments that reaches the LM head, and other layers behind the
        model's trunk (`logits_to_keep`); None for all of them. All rows reach it.
        """
        kept = segments if kept is None else kept
        packed = (self.bank.version, tuple(slots), tuple(segments), tuple(kept))
        if packed != self._packed:
            self._packed = None
            scales = self.bank.packed(slots, segments)
            behind = self.modules_of_base.head
            head = {target for target in self.bank.columns if target.module in behind}
            if kept != segments and head:
                of_head = self.bank.packed(slots, kept, only=head)
                scales = {t: s for t, s in scales.items() if t not in head} | of_head
            self._set_scales(scales)
            if self._saved:
                self._set_copies(_by_token(slots, segments), _by_token(slots, kept))
            self._packed = packed

    def set_rows(self, slots: Sequence[int]) -> None:
        """Set the batch of the next forwards: `[batch, tokens]`, whose row i uses `slots[i]`. Costs
        nothing while the batch stays as it is."""
        packed = (self.bank.version, tuple(slots), None)
        if packed != self._packed:
            self._packed = None
            self._set_scales(self.bank.by_row(slots))
            self._set_copies(slots, flat=False)
            self._packed = packed

    def _set_copies(
        self, slots: Sequence[int], head_slots: Sequence[int] | None = None, *, flat: bool = True
    ) -> None:
        """Set the slot of each token or row; the LM head may see fewer of them."""
        device = self.bank.device
        layout = Layout(slots, self._with_copies, device, flat=flat)
        of_head = layout
        if head_slots is not None and head_slots != slots:
            of_head = Layout(head_slots, self._with_copies, device, flat=flat)
        for name, layer in self._saved.items():
            layer.use(of_head if name in self.modules_of_base.head else layout)

    def _set_scales(self, scales: dict[Target, Scale]) -> None:
        self._packed = None
        if scales == self._scaled:
            return  # The same scales read the vectors that the bank has written for this batch.
        self._scales_version += 1
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

    def unload(self) -> PreTrainedModel:
        """Take all layers out and return the base model as it was before."""
        self._set_scales({})
        self._wrapping.undo()
        self._layers_version += 1
        self._layers.clear()
        self._saved.clear()
        self._with_copies.clear()
        # Its columns belong to modules that are no longer wrapped.
        self.bank = AdapterBank(self.modules_of_base, self.capacity, self.base.device)
        return self.base


def _by_token(slots: Sequence[int], segments: Sequence[Segment]) -> list[int]:
    """Return the slot of each token of a flat batch."""
    by_token = list(slots)
    for segment in segments:
        by_token += [segment.slot] * segment.tokens
    return by_token
