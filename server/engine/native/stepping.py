"""Runs a step; what cannot run fails alone, and the rest runs without it.

A step that fails runs again in halves, and these in halves, down to one sequence. Nothing of a
sequence has changed until its part has run: half-written keys and values are overwritten.
"""

import logging
import math
import time
from collections import abc
from dataclasses import dataclass

import torch

from server.engine.native.cache.kv_cache import KVCache
from server.engine.native.faults import Fault, is_foreign
from server.engine.native.forward.runner import Runner
from server.engine.native.sampling.sampler import Sampled, Sampler, score_tokens
from server.engine.native.sequences.sequence import Sequence
from server.engine.native.sequences.step import Step
from server.engine.request import TokenLogprob

log = logging.getLogger(__name__)

_RECOVERY = 32
"""Steps after which twice as many tokens are tried again."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A step, or a part of one, and what it brought."""

    step: Step
    seconds: float
    prompts: list[tuple[Sequence, list[TokenLogprob]]]
    """Scores of the next prompt tokens that had none."""
    choices: list[tuple[Sequence, abc.Sequence[Sampled]]]


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that cannot run, not even alone."""

    sequence: Sequence
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Sequences whose keys and values are gone: they have to be computed again."""

    sequences: list[Sequence]


class Stepping:
    def __init__(self, runner: Runner, sampler: Sampler, cache: KVCache) -> None:
        self._runner = runner
        self._sampler = sampler
        self._cache = cache
        self.retries = 0
        """Forwards that failed and ran again in parts."""
        self._most = math.inf
        """Tokens that a forward may have, since more found no memory."""
        self._too_many = 0
        self._good = 0
        """Steps since then, or since more were tried."""

    def run(self, step: Step) -> abc.Iterator[Ran | Failed | Lost]:
        """A step of n rows and chunks takes fewer than 2 n forwards, and one for each time that a
        chunk is halved. Raises torch.AcceleratorError where the device is lost."""
        parts = [step]
        while parts:
            part = parts.pop()
            if part.tokens > self._most and (smaller := self._halve(part, chunks=True)):
                parts += reversed(smaller)
                continue
            fault = None
            try:
                ran = self._attempt(part)
            except BaseException as error:
                if not is_foreign(error):
                    raise
                fault = Fault.of(error)
            if fault is None:
                yield ran
                continue
            if fault.no_memory:
                self._save_memory(part)
            smaller = self._halve(part, chunks=fault.no_memory)
            if not smaller:
                [sequence] = part.sequences
                log.error("A request failed alone; it ends.\n%s", fault.trace)
                yield Failed(sequence, fault.reason)
                continue
            log.warning("A step failed and runs again in parts: %s", fault.message)
            self.retries += 1
            if fault.keys_lost:
                yield Lost(part.sequences)
            else:
                parts += reversed(smaller)
        self._try_more()

    def _attempt(self, step: Step) -> Ran:
        started = time.perf_counter()
        logits = self._runner.run(step)
        prompts = []
        for sequence, scores in logits.prompts:
            known = len(sequence.prompt_logprobs)
            scored = sequence.tokens[known : known + len(scores)]
            best = sequence.request.params.prompt_logprobs or 0
            prompts.append((sequence, score_tokens(scores, scored, best)))
        choices: list[tuple[Sequence, abc.Sequence[Sampled]]] = []
        if logits.drafts is not None and step.drafts:
            verified = self._sampler.verify(logits.drafts, step.drafts)
            choices += zip((draft.sequence for draft in step.drafts), verified, strict=True)
        sampled = self._sampler.sample(logits.next_token, logits.sequences)
        choices += [(s, [choice]) for s, choice in zip(logits.sequences, sampled, strict=True)]
        return Ran(step, time.perf_counter() - started, prompts, choices)

    def _halve(self, step: Step, chunks: bool) -> list[Step]:
        """Empty where there is nothing to halve. A lone chunk is halved if `chunks`: its rest waits
        for the next step."""
        if step.drafts:
            rows = {s.row: s for s in [*step.decode, *(d.sequence for d in step.drafts)]}
            decode = [rows[row] for row in self._cache.order(list(rows))]
            return [Step(decode, step.prefill)]
        half = len(step.sequences) // 2
        if half > 0:
            later = max(0, half - len(step.decode))
            return [
                Step(step.decode[:half], step.prefill[:later]),
                Step(step.decode[half:], step.prefill[later:]),
            ]
        if not step.prefill or not chunks:
            return []
        [(sequence, tokens)] = step.prefill
        if tokens == 1 or sequence.computed < sequence.source_tokens:
            return []
        return [Step([], [(sequence, tokens // 2)])]

    def _save_memory(self, step: Step) -> None:
        # Does nothing where no GPU is in use.
        torch.cuda.empty_cache()
        self._most = max(1, step.tokens // 2)
        self._too_many = max(self._too_many, step.tokens)
        self._good = 0

    def _try_more(self) -> None:
        if self._most == math.inf:
            return
        self._good += 1
        if self._good == _RECOVERY:
            self._good = 0
            self._most *= 2
            if self._most >= self._too_many:
                self._most, self._too_many = math.inf, 0
