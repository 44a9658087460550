"""Runs steps. When one fails, finds the sequence that cannot run, so that the others go on.

A step that fails is run again in halves, which are halved again, down to one sequence. A sequence
changes only when its part has run. Keys and values that a failed part has written are overwritten.
"""

import logging
import math
import time
from collections import abc
from dataclasses import dataclass

import torch

from infuse.server.engine.native.cache.kv_cache import KVCache
from infuse.server.engine.native.faults import Fault, is_foreign
from infuse.server.engine.native.forward.runner import Runner
from infuse.server.engine.native.sampling.sampler import Sampled, Sampler, score_tokens
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import TokenLogprob

log = logging.getLogger(__name__)

RECOVERY_STEPS = 32
"""After this many steps without an error, the limit of tokens is doubled."""


@dataclass(frozen=True, slots=True)
class Ran:
    """A step, or a part of one, that has run, and its results."""

    step: Step
    seconds: float
    prompts: list[tuple[Sequence, list[TokenLogprob]]]
    """For each sequence that scores its prompt, the scores of the next tokens that had none."""
    choices: list[tuple[Sequence, abc.Sequence[Sampled]]]
    """For each sequence whose tokens are all computed, its next tokens."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A sequence that failed alone."""

    sequence: Sequence
    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Sequences whose keys and values are lost: they must be computed again."""

    sequences: list[Sequence]


class Stepping:
    """Runs steps with the runner and the sampler, and divides those that fail."""

    def __init__(self, runner: Runner, sampler: Sampler, cache: KVCache) -> None:
        self._runner = runner
        self._sampler = sampler
        self._cache = cache
        self.begins: abc.Callable[[int], None] = lambda _: None
        """Called before each forward, with the number of its tokens."""
        self.retries = 0
        """Forwards that failed and were run again in parts."""
        self._most_tokens = math.inf
        """The limit of a forward's tokens, since one with more ran out of memory."""
        self._too_many = 0
        """The most tokens of a forward that ran out of memory."""
        self._good_steps = 0
        """Steps since the last change of `_most_tokens`."""

    def run(self, step: Step) -> abc.Iterator[Ran | Failed | Lost]:
        """Run a step, and yield the result of each part.

        A step of n rows and chunks takes fewer than 2 n forwards, and one more each time that a
        chunk is halved. Raises torch.AcceleratorError if the device is lost.
        """
        parts = [step]
        while parts:
            part = parts.pop()
            if part.tokens > self._most_tokens and (smaller := self._halve(part, chunks=True)):
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
        self.begins(step.tokens)
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
        """Divide a step into two parts. With `chunks`, a single chunk is halved, and its second
        half waits for the next step. Empty: the step cannot be divided."""
        if step.drafts:
            by_id = {s.seq_id: s for s in [*step.decode, *(d.sequence for d in step.drafts)]}
            decode = [by_id[seq_id] for seq_id in self._cache.order(list(by_id))]
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
        self._most_tokens = max(1, step.tokens // 2)
        self._too_many = max(self._too_many, step.tokens)
        self._good_steps = 0

    def _try_more(self) -> None:
        if self._most_tokens == math.inf:
            return
        self._good_steps += 1
        if self._good_steps == RECOVERY_STEPS:
            self._good_steps = 0
            self._most_tokens *= 2
            if self._most_tokens >= self._too_many:
                self._most_tokens, self._too_many = math.inf, 0
