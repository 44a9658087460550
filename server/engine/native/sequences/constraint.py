"""Follows grammars: a sequence's state in its own, and the next masks of a batch, which are made on
another thread while the model computes the next logits."""

from collections import abc
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer

from infuse.server.engine.constraints.grammars import Grammar, Masks, masks_of


class Constraint:
    """The state of one sequence in its grammar. Belongs to the model thread."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._masks = grammar.first
        self._row = 0

    @cached_property
    def matcher(self) -> LLMatcher:
        """The sequence's matcher. Belongs to the mask maker's thread."""
        return self._grammar.copy()

    @property
    def lexicon(self) -> LLTokenizer:
        return self._grammar.lexicon

    @property
    def allowed(self) -> torch.Tensor:
        """`[vocab]` bool: the tokens that may come next. Waits until the mask is made."""
        return self._masks.result().allowed[self._row]

    @property
    def error(self) -> str:
        """Why the grammar cannot continue; empty if it can. Waits as `allowed` does."""
        return self._masks.result().errors[self._row]

    def allows_others_than(self, tokens: frozenset[int]) -> bool:
        allowed = self.allowed
        return int(allowed.sum()) > int(allowed[list(tokens)].sum())

    def follow(self, masks: Future[Masks], row: int) -> None:
        """Take the next mask from this row of `masks`."""
        self._masks, self._row = masks, row


class MaskMaker:
    """Makes the next masks of a batch while the model runs, on a thread that releases the GIL."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        """A single thread, so that matchers consume a sequence's tokens in order."""

    def advance(self, taken: abc.Sequence[tuple[Constraint, int]]) -> None:
        """Start to make the masks after each sequence has taken this token. Returns at once."""
        masks = self._thread.submit(self._advance, taken)
        for row, (constraint, _) in enumerate(taken):
            constraint.follow(masks, row)

    def close(self) -> None:
        self._thread.shutdown()

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def _advance(self, taken: abc.Sequence[tuple[Constraint, int]]) -> Masks:
        matchers = [constraint.matcher for constraint, _ in taken]
        tokens = [token for _, token in taken]
        self._executor.consume_token_par(list(zip(matchers, tokens, strict=True)))
        return masks_of(matchers, taken[0][0].lexicon, self._executor)
