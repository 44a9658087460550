"""The vectors of all resident adapters, stacked on the device; a row of the stack is a slot."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from adapters.checkpoint import AdapterVectors
from adapters.config import IA3Config
from adapters.errors import InvalidAdapter
from adapters.layer import ByToken, Scale, Scratch
from adapters.targets import BaseModules, Target, resolve_targets

BASE_SLOT = 0
"""The slot of the base model itself: ones everywhere, so that it costs no storage."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a packed batch that use one slot."""

    slot: int
    tokens: int


class _Sheet:
    """The columns that were first needed together: one side by side matrix for all slots.

    `slots` is `[slots, width]`; `rows` is `[rows, width]`, the vectors of the running batch in the
    batch's order, so that each layer takes a view of it and a row is written only when another
    slot takes it.
    """

    def __init__(self, columns: dict[Target, slice], slots: int, rows: int, device: torch.device):
        self.columns = columns
        self.width = max(column.stop for column in columns.values())
        self.slots = torch.ones(slots, self.width, device=device)
        self.used: dict[int, int] = {}
        """Slot -> how many fills the bank had seen at this one: names the slot's content."""
        self.reserve(rows)

    def reserve(self, rows: int) -> None:
        self.rows = torch.ones(rows, self.width, device=self.slots.device)
        self.occupants: list[tuple[int, int]] = [(BASE_SLOT, 0)] * rows

    def write_rows(self, slots: Sequence[int]) -> None:
        """Bring row i up to date with the vectors of `slots[i]`; unchanged rows cost nothing."""
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


class AdapterBank:
    """Owns every resident vector. A column is a (module, side) that some adapter has used.

    Columns are made on first use, a sheet of them at a time, and cost nothing before. A sheet
    that no row of the batch uses is passed over by its layers.
    """

    def __init__(self, modules: BaseModules, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.device = device
        self._modules = modules
        self._rows = 1
        self._sheets: list[_Sheet] = []
        self._scratch = Scratch() if device.type == "cpu" else None
        self.fills = 0
        """How many times a slot was filled: the bank's content changes only with it."""
        self.by_token = False
        """A batch's scales name each token's slot, for products that read the vectors there."""
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
        return sum(sheet.slots.nbytes + sheet.rows.nbytes for sheet in self._sheets)

    def planned_nbytes(self) -> int:
        """Bytes on the device once every slot holds an adapter with PEFT's default targets for this
        model; 0 where PEFT names none. Others may take more."""
        try:
            targets = resolve_targets(IA3Config(), self._modules)
        except InvalidAdapter:
            return 0
        width = sum(self._modules.size(target) for target in targets)
        return (self.capacity + 1 + self._rows) * width * torch.float32.itemsize

    def reserve_rows(self, rows: int) -> None:
        """Make room for batches of up to `rows` rows."""
        if rows > self._rows:
            self._rows = rows
            for sheet in self._sheets:
                sheet.reserve(rows)

    def fill(self, slot: int, vectors: AdapterVectors) -> None:
        """Write an adapter into a slot: one copy from the host per sheet."""
        assert BASE_SLOT < slot <= self.capacity, f"slot {slot} of {self.capacity}"
        self._make_columns(vectors)
        self.fills += 1
        for sheet in self._sheets:
            sheet.used.pop(slot, None)
            if vectors.vectors.keys().isdisjoint(sheet.columns):
                continue
            parts = [
                vectors.vectors[target]
                if target in vectors.vectors
                else torch.ones(self._modules.size(target))
                for target in sheet.columns
            ]
            host = torch.empty(sheet.width, pin_memory=self.device.type == "cuda")
            sheet.slots[slot].copy_(torch.cat(parts, out=host), non_blocking=True)
            sheet.used[slot] = self.fills

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
            width += size
        if columns:
            self._sheets.append(_Sheet(columns, self.capacity + 1, self._rows, self.device))

    def uniform(self, slot: int) -> dict[Target, Scale]:
        """Every row of any batch uses `slot`."""
        return {
            target: Scale(sheet.slots[slot, column])
            for sheet in self._sheets
            if slot in sheet.used
            for target, column in sheet.columns.items()
        }

    def by_row(self, slots: Sequence[int]) -> dict[Target, Scale]:
        """Row i of a `[batch, tokens, size]` batch uses `slots[i]`."""
        scales = {}
        for sheet in self._sheets:
            if sheet.used.keys().isdisjoint(slots):
                continue
            index = [slot if slot in sheet.used else BASE_SLOT for slot in slots]
            vectors = sheet.slots.index_select(0, torch.tensor(index, device=self.device))
            for target, column in sheet.columns.items():
                scales[target] = Scale(vectors[:, None, column], scratch=self._scratch)
        return scales

    def packed(self, rows: Sequence[int], segments: Sequence[Segment]) -> dict[Target, Scale]:
        """A flat `[1, tokens, size]` batch: one token for each of `rows`, then the segments."""
        if self.by_token or (segments and self.device.type == "cuda"):
            return self._packed_by_token(rows, segments)
        if not segments:
            return {
                target: Scale(sheet.rows[: len(rows), column], scratch=self._scratch)
                for sheet in self._written(rows)
                for target, column in sheet.columns.items()
            }
        scales: dict[Target, Scale] = {}
        writing = list(self._written(rows))
        for sheet in self._sheets:
            spans = [(0, len(rows), sheet.rows[: len(rows)])] if sheet in writing else []
            start = len(rows)
            for segment in segments:
                if segment.slot in sheet.used:
                    spans.append((start, start + segment.tokens, sheet.slots[segment.slot]))
                start += segment.tokens
            if spans:
                for target, column in sheet.columns.items():
                    pieces = [(a, b, vectors[..., column]) for a, b, vectors in spans]
                    scales[target] = Scale(pieces=pieces, scratch=self._scratch)
        return scales

    def _packed_by_token(
        self, rows: Sequence[int], segments: Sequence[Segment]
    ) -> dict[Target, Scale]:
        """Scales that name each token's slot: one gather for all tokens costs a GPU less than a
        kernel for each segment, and our products need none."""
        slots = [*rows, *(segment.slot for segment in segments)]
        tokens = torch.tensor([*(1 for _ in rows), *(segment.tokens for segment in segments)])
        scales = {}
        for sheet in self._sheets:
            if sheet.used.keys().isdisjoint(slots):
                continue
            used = torch.tensor([slot if slot in sheet.used else BASE_SLOT for slot in slots])
            by_token = used.repeat_interleave(tokens).to(self.device)
            for target, column in sheet.columns.items():
                vectors = ByToken(sheet.slots[:, column], by_token)
                scales[target] = Scale(by_token=vectors, scratch=self._scratch)
        return scales

    def _written(self, slots: Sequence[int]) -> Iterable[_Sheet]:
        """The sheets that some of these rows use, with the rows' vectors in place."""
        assert len(slots) <= self._rows, "reserve_rows first"
        for sheet in self._sheets:
            if self.keep_active or not sheet.used.keys().isdisjoint(slots):
                sheet.write_rows(slots)
                yield sheet
