"""The flat runner: packs the tokens of a step into one flat forward and returns logits."""

import inspect
from collections import abc
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from infuse.adapters.model.bank import Segment
from infuse.adapters.model.slots import IA3Slots
from infuse.server.engine.native.attention import Chunk, StepContext
from infuse.server.engine.native.cache.kv_cache import FlatCache
from infuse.server.engine.native.cache.paged_cache import PagedCache
from infuse.server.engine.native.cache.planning import Limits
from infuse.server.engine.native.forward.cuda_graphs import DecodeGraphs
from infuse.server.engine.native.forward.tracing import Forward
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits that a step computed."""

    sequences: list[Sequence]
    """The sequences that are computed to their end: each takes its next token."""
    next_token: torch.Tensor
    """`[sequences, vocab]`."""
    prompts: list[tuple[Sequence, torch.Tensor]]
    """Sequences that score their prompts, with `[tokens, vocab]`: the logits of the next prompt
    tokens that have no score yet."""
    drafts: torch.Tensor | None = None
    """`[positions, vocab]`: for each drafted row, the logits after its latest token and after each
    drafted token."""


class Runner(Protocol):
    """Runs a model's forward for a step."""

    def run(self, step: Step) -> Logits: ...


class FlatRunner:
    """Runs all rows' tokens as one `[1, tokens]` batch, on the engine's own KV cache."""

    def __init__(
        self,
        ia3: IA3Slots,
        context: StepContext,
        cache: FlatCache,
        modules: "Modules",
        traced: Forward | None,
        limits: Limits,
    ) -> None:
        """`traced`: runs instead of `modules` in steps whose adapters have no saved modules."""
        self._ia3 = ia3
        self._context = context
        self._cache = cache
        self._device = ia3.base.device
        self._modules = modules
        self._traced = traced
        ia3.bank.reserve_rows(limits.max_rows)
        self._graphs: DecodeGraphs | None = None
        if self._device.type == "cuda" and isinstance(cache, PagedCache):
            self._graphs = DecodeGraphs(ia3, context, cache, traced or modules, limits)

    @torch.inference_mode()
    def run(self, step: Step) -> Logits:
        decode = [Chunk(seq_id=s.seq_id, start=s.computed, tokens=1) for s in step.decode]
        pieces = [(s, s.tokens[s.computed : s.computed + n]) for s, n in step.prefill]
        pieces += [(d.sequence, [d.sequence.tokens[-1], *d.tokens]) for d in step.drafts]
        chunks = [
            Chunk(seq_id=s.seq_id, start=s.computed, tokens=len(tokens)) for s, tokens in pieces
        ]
        slots = [slot_of(sequence) for sequence in step.decode]
        # A captured graph does not run the saved modules of adapters.
        captured = not chunks and not self._ia3.has_copies(slots)
        if self._graphs is not None and captured and self._graphs.fit(decode):
            last = [sequence.tokens[-1] for sequence in step.decode]
            return Logits(step.decode, self._graphs.run(last, decode, slots), [])
        wanted = _Wanted.of(step)
        segments = [Segment(slot_of(s), len(tokens)) for s, tokens in pieces]
        kept = wanted.kept if self._modules.keeps_logits else None
        self._ia3.set_packed(slots, segments, kept)
        ids = [sequence.tokens[-1] for sequence in step.decode]
        positions = [sequence.computed for sequence in step.decode]
        for sequence, tokens in pieces:
            ids += tokens
            positions += range(sequence.computed, sequence.computed + len(tokens))
        with self._context.step(self._cache.plan(decode, chunks)):
            logits = self._forward(slots, segments)(
                torch.tensor([ids], device=self._device),
                torch.tensor([positions], device=self._device),
                torch.tensor(wanted.index, dtype=torch.long, device=self._device),
            )
        taking, drafted = len(wanted.taking), len(logits) - wanted.drafted
        scored = torch.split(logits[taking:drafted], [tokens for _, tokens in wanted.scoring])
        prompts = [(s, part) for (s, _), part in zip(wanted.scoring, scored, strict=True)]
        return Logits(wanted.taking, logits[:taking], prompts, logits[drafted:])

    def _forward(self, rows: abc.Sequence[int], segments: abc.Sequence[Segment]) -> Forward:
        if self._traced is None or self._ia3.has_copies([*rows, *(s.slot for s in segments)]):
            return self._modules
        return self._traced


class Modules:
    """The forward by transformers' modules. Returns `[index, vocab]`: the logits after the tokens
    at the indices `keep`."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self.keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        arguments = {"logits_to_keep": keep} if self.keeps_logits else {}
        out = self._base(input_ids=ids, position_ids=positions, use_cache=False, **arguments)
        logits: torch.Tensor = out.logits[0]
        return logits if self.keeps_logits else logits[keep]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The sequences whose logits a step needs, and their indices in the flat batch."""

    taking: list[Sequence]
    scoring: list[tuple[Sequence, int]]
    index: list[int]
    kept: list[Segment]
    """The entries of `index` after the decoding rows, as segments."""
    drafted: int
    """How many of the last entries of `index` are tokens of drafted rows."""

    @classmethod
    def of(cls, step: Step) -> "_Wanted":
        taking, ends = list(step.decode), list(range(len(step.decode)))
        scoring: list[tuple[Sequence, int]] = []
        scored: list[int] = []
        kept: list[Segment] = []
        start = len(step.decode)
        for sequence, tokens in step.prefill:
            if tokens == sequence.uncomputed:
                taking.append(sequence)
                ends.append(start + tokens - 1)
                kept.append(Segment(slot_of(sequence), 1))
            unscored = sequence.unscored(tokens)
            if unscored:
                scoring.append((sequence, len(unscored)))
                scored += range(start + unscored.start, start + unscored.stop)
            start += tokens
        kept += [Segment(slot_of(sequence), tokens) for sequence, tokens in scoring]
        kept += [Segment(slot_of(draft.sequence), 1 + len(draft.tokens)) for draft in step.drafts]
        drafted = range(start, step.tokens)
        return cls(taking, scoring, [*ends, *scored, *drafted], kept, len(drafted))


def slot_of(sequence: Sequence) -> int:
    assert sequence.slot is not None, "a running sequence has a slot"
    return sequence.slot
