"""The bank stacks the vectors of all resident adapters on the device, one slot each."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass

import torch

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.config import IA3Config
from infuse.adapters.checkpoint.targets import BaseModules, Target, resolve_targets
from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.model.layer import ByToken, Scale, Scratch

BASE_SLOT = 0
"""The slot of the base model itself, whose vectors are all ones."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a packed batch that use one slot."""

    slot: int
    tokens: int


class _Sheet:
    """The columns that were first needed together, side by side in one matrix for all slots.

    `slots` is `[slots, width]`. `rows` is `[rows, width]`: the vectors of the batch rows, in their
    order, so that each layer takes a view; a row is written only when it uses another slot than
    before.
    """

    def __init__(
        self, columns: dict[Target, slice], width: int, slots: int, device: torch.device
    ) -> None:
        self.columns = columns
        self.width = width
        self.slots = torch.ones(slots, width, device=device)
        self.used: dict[int, int] = {}
        """Slot -> the version of the bank at which it was filled, which identifies its content."""
        self.reserve(0)

    def reserve(self, rows: int) -> None:
        self.rows = torch.ones(rows, self.width, device=self.slots.device)
        self.occupants: list[tuple[int, int]] = [(BASE_SLOT, 0)] * rows

    def write_rows(self, slots: Sequence[int]) -> None:
        """Write the vectors of `slots[i]` into batch row i; unchanged rows cost nothing."""
        stale = []
        for row, slot in enumerate(slots):
            occupant = (slot, self.used[slot]) if slot in self.used else (BASE_SLOT, 0)
            if self.occupants[row] != occupant:
                stale.append((row, occupant))
        if not stale:
            return
        if self.slots.is_cuda:
            pairs = [(row, slot) for row, (slot, _) in stale]
            index = torch.tensor(pairs, device=self.slots.device)
            self.rows.index_copy_(0, index[:, 0], self.slots.index_select(0, index[:, 1]))
        else:
            for row, (slot, _) in stale:
                self.rows[row].copy_(self.slots[slot])
        for row, occupant in stale:
            self.occupants[row] = occupant


class _Panels:
    """A batch's vectors for our kernels, in the order in which a matmul reads them.

    In a sheet they lie far apart, and the kernel would wait for memory at each. A slot keeps its
    entry from batch to batch, whatever batch rows use it, until another slot needs the entry.
    """

    def __init__(self, sheet: _Sheet, rows: int, width: int) -> None:
        self.sheet = sheet
        self.vectors = torch.ones(sheet.width // width, 1 + rows, width)
        """`[panels, entries, width]`; entry 0 is the base's."""
        self._entries: dict[int, tuple[int, int]] = {}
        """Slot -> its entry, and the version at which the slot was filled that the entry holds."""
        self._free = list(range(rows, 0, -1))
        self._tokens = torch.zeros(0, dtype=torch.long)
        """Each token's entry, in the running batch."""
        self._scales: dict[Target, Scale] = {}

    def scales(
        self, slots: Sequence[int], tokens: torch.Tensor, only: Set[Target] | None
    ) -> dict[Target, Scale]:
        """Return the scales of a batch of which `slots[i]` has `tokens[i]` tokens.

        Without `only`, each batch gets the same objects, which kernels hold on to: those of the
        batch before change with this call.
        """
        entries = self._find(slots)
        if not entries:
            return {}
        index = torch.tensor([entries.get(slot, 0) for slot in slots]).repeat_interleave(tokens)
        columns = self.sheet.columns.keys()
        if only is not None:
            return {each: self._scale(each, index) for each in columns & only}
        if len(index) > len(self._tokens):
            self._tokens = torch.zeros(2 * len(index), dtype=torch.long)
            self._scales = {each: self._scale(each, self._tokens) for each in columns}
        self._tokens[: len(index)] = index
        return self._scales

    def _scale(self, target: Target, tokens: torch.Tensor) -> Scale:
        column, width = self.sheet.columns[target], self.vectors.shape[-1]
        panels = self.vectors[column.start // width : -(-column.stop // width)]
        return Scale(by_token=ByToken(panels, tokens, column.stop - column.start))

    def _find(self, slots: Iterable[int]) -> dict[int, int]:
        """Return the entry of each slot of a batch, written where the slot's content is new."""
        sheet = self.sheet
        used = {slot: sheet.used[slot] for slot in slots if slot in sheet.used}
        for slot, (_, content) in list(self._entries.items()):
            if sheet.used.get(slot) != content:
                self._free_entry(slot)
        missing = [slot for slot in used if slot not in self._entries]
        for slot in list(self._entries):
            if len(self._free) < len(missing) and slot not in used:
                self._free_entry(slot)
        assert len(self._free) >= len(missing), "reserve_rows first"
        for slot in missing:
            entry = self._free.pop()
            self.vectors[:, entry].copy_(sheet.slots[slot].view(len(self.vectors), -1))
            self._entries[slot] = entry, used[slot]
        return {slot: self._entries[slot][0] for slot in used}

    def _free_entry(self, slot: int) -> None:
        entry, _ = self._entries.pop(slot)
        self._free.append(entry)


class AdapterBank:
    """Owns every resident vector. A column is a (module, side) that some adapter has used.

    Columns are made on first use, a sheet of them at a time, and cost nothing before. Where no
    adapter of the batch uses a sheet, its layers scale nothing.
    """

    def __init__(self, modules: BaseModules, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self._modules = modules
        self._rows = 1
        self._sheets: list[_Sheet] = []
        self._panels: list[_Panels] = []
        """The panels of each sheet, where kernels read them."""
        self._panel_width: int | None = None
        self._scratch = Scratch() if device.type == "cpu" else None
        self.version = 0
        """Grows when a slot is filled: the vectors of used slots change only then."""
        self.keep_active = False
        """Scale by ones rather than skip: a captured CUDA graph must hold every column."""

    @property
    def columns(self) -> Iterable[Target]:
        return (target for sheet in self._sheets for target in sheet.columns)

    @property
    def column_count(self) -> int:
        return sum(len(sheet.columns) for sheet in self._sheets)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        panels = sum(panels.vectors.nbytes for panels in self._panels)
        return panels + sum(sheet.slots.nbytes + sheet.rows.nbytes for sheet in self._sheets)

    def planned_nbytes(self) -> int:
        """Bytes on the device once every slot holds an adapter with PEFT's default targets for this
        model; 0 where PEFT has no default. Adapters with more targets take more."""
        try:
            targets = resolve_targets(IA3Config(), self._modules)
        except InvalidAdapter:
            return 0
        width = sum(self._padded(self._modules.size(target)) for target in targets)
        batch_rows = self._rows + (self._panel_width is not None)
        return (self.capacity + 1 + batch_rows) * width * torch.float32.itemsize

    def reserve_rows(self, rows: int) -> None:
        """Reserve memory for batches of up to `rows` rows."""
        if rows > self._rows:
            self._rows = rows
            self._panels.clear()
            for sheet in self._sheets:
                self._reserve(sheet)

    def use_panels(self, width: int) -> None:
        """Make scales point to each token's vector, for kernels that read panels of `width`."""
        assert not self._sheets, "called before the first adapter"
        self._panel_width = width

    def _reserve(self, sheet: _Sheet) -> None:
        """Reserve memory for the vectors of a batch."""
        if self._panel_width is None:
            sheet.reserve(self._rows)
        else:
            self._panels.append(_Panels(sheet, self._rows, self._panel_width))

    def fill(self, slot: int, vectors: AdapterVectors) -> None:
        """Write an adapter into a slot: one copy from the host per sheet."""
        assert BASE_SLOT < slot <= self.capacity, f"slot {slot} of {self.capacity}"
        self._make_columns(vectors)
        self.version += 1
        for sheet in self._sheets:
            sheet.used.pop(slot, None)
            if vectors.vectors.keys().isdisjoint(sheet.columns):
                continue
            device = sheet.slots[slot]
            host = torch.empty(sheet.width, pin_memory=True) if device.is_cuda else device
            torch.cat(list(self._parts(sheet, vectors)), out=host)
            if host is not device:
                device.copy_(host, non_blocking=True)
            sheet.used[slot] = self.version

    def _parts(self, sheet: _Sheet, vectors: AdapterVectors) -> Iterator[torch.Tensor]:
        """The vectors of a slot of a sheet, one after the other; ones where there is none."""
        end = 0
        for target, column in sheet.columns.items():
            if column.start > end:
                yield torch.ones(column.start - end)
            end = column.stop
            known = target in vectors.vectors
            yield vectors.vectors[target] if known else torch.ones(end - column.start)
        if end < sheet.width:
            yield torch.ones(sheet.width - end)

    def clear(self, slot: int) -> None:
        """Forget a slot's adapter; nothing may use the slot any more."""
        for sheet in self._sheets:
            if sheet.used.pop(slot, None) is not None:
                sheet.slots[slot].fill_(1.0)

    def _make_columns(self, vectors: AdapterVectors) -> None:
        known = set(self.columns)
        columns: dict[Target, slice] = {}
        width = 0
        for target in sorted(set(vectors.vectors) - known):
            size = self._modules.size(target)
            columns[target] = slice(width, width + size)
            width += self._padded(size)
        if columns:
            self._sheets.append(_Sheet(columns, width, self.capacity + 1, self.device))
            self._reserve(self._sheets[-1])

    def _padded(self, size: int) -> int:
        """Round a width up to whole panels."""
        return size + -size % (self._panel_width or 1)

    def by_row(self, slots: Sequence[int]) -> dict[Target, Scale]:
        """Return the scales of a `[batch, tokens, size]` batch whose row i uses `slots[i]`."""
        scales = {}
        for sheet in self._sheets:
            if sheet.used.keys().isdisjoint(slots):
                continue
            index = [slot if slot in sheet.used else BASE_SLOT for slot in slots]
            vectors = sheet.slots.index_select(0, torch.tensor(index, device=self.device))
            for target, column in sheet.columns.items():
                scales[target] = Scale(vectors[:, None, column], scratch=self._scratch)
        return scales

    def packed(
        self, slots: Sequence[int], segments: Sequence[Segment], only: Set[Target] | None = None
    ) -> dict[Target, Scale]:
        """Return the scales of a flat `[1, tokens, size]` batch: a token for each batch row, whose
        slots are `slots`, then the segments.

        With `only`, those of these columns. Without it, the scales of the batch before are no
        longer valid.
        """
        if self._panel_width is not None:
            every, tokens = _slots_of(slots, segments)
            found = [panels.scales(every, tokens, only) for panels in self._panels]
            return {target: scale for scales in found for target, scale in scales.items()}
        scales = self._packed(slots, segments)
        return scales if only is None else {t: s for t, s in scales.items() if t in only}

    def _packed(self, slots: Sequence[int], segments: Sequence[Segment]) -> dict[Target, Scale]:
        if segments and self.device.type == "cuda":
            return self.by_token(slots, segments)
        if not segments:
            return {
                target: Scale(sheet.rows[: len(slots), column], scratch=self._scratch)
                for sheet in self._written(slots)
                for target, column in sheet.columns.items()
            }
        scales: dict[Target, Scale] = {}
        written = list(self._written(slots))
        for sheet in self._sheets:
            spans = [(0, len(slots), sheet.rows[: len(slots)])] if sheet in written else []
            start = len(slots)
            for segment in segments:
                if segment.slot in sheet.used:
                    spans.append((start, start + segment.tokens, sheet.slots[segment.slot]))
                start += segment.tokens
            if spans:
                for target, column in sheet.columns.items():
                    pieces = [(a, b, vectors[..., column]) for a, b, vectors in spans]
                    scales[target] = Scale(pieces=pieces, scratch=self._scratch)
        return scales

    def by_token(self, slots: Sequence[int], segments: Sequence[Segment]) -> dict[Target, Scale]:
        """`packed` with a gather for all tokens: a GPU takes less time for it than for a kernel for
        each segment."""
        every, tokens = _slots_of(slots, segments)
        scales = {}
        for sheet in self._sheets:
            if sheet.used.keys().isdisjoint(every):
                continue
            used = torch.tensor([slot if slot in sheet.used else BASE_SLOT for slot in every])
            by_token = used.repeat_interleave(tokens).to(self.device)
            for target, column in sheet.columns.items():
                vectors = ByToken(
                    sheet.slots[None, :, column], by_token, self._modules.size(target)
                )
                scales[target] = Scale(by_token=vectors, scratch=self._scratch)
        return scales

    def _written(self, slots: Sequence[int]) -> Iterable[_Sheet]:
        """The sheets that some of these slots use, with their vectors written to the batch rows."""
        assert len(slots) <= self._rows, "reserve_rows first"
        for sheet in self._sheets:
            if self.keep_active or not sheet.used.keys().isdisjoint(slots):
                sheet.write_rows(slots)
                yield sheet


def _slots_of(slots: Sequence[int], segments: Sequence[Segment]) -> tuple[list[int], torch.Tensor]:
    """Return the slots of a flat batch's rows and segments, and how many tokens each has."""
    every = [*slots, *(segment.slot for segment in segments)]
    return every, torch.tensor([*(1 for _ in slots), *(segment.tokens for segment in segments)])
