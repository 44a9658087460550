"""Constrained answers: the tokens that a row's grammar allows next, through llguidance.

A grammar is compiled once, by whoever asks for it and never on the model thread. Each sequence
walks it with a matcher of its own; a batch's next masks are made on a thread of their own, while
the model computes the next logits.
"""

import json
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from transformers import PreTrainedTokenizerFast

from server.engine.errors import BadConstraint, ConstraintsUnavailable
from server.engine.vetting import GrammarKind, compiled, error_of, vet

MAX_CHARACTERS = 1 << 16
"""Of a grammar's source. More take seconds to compile, and a model has no use for them."""
MAX_CACHED = 64


@dataclass(frozen=True, slots=True)
class Masks:
    allowed: torch.Tensor
    """`[rows, vocab]` bool, on the CPU."""
    errors: list[str]
    """Of each row: empty, or why its grammar cannot go on."""


class Grammar:
    """A compiled constraint. Immutable: every sequence walks a copy."""

    def __init__(self, matcher: LLMatcher, lexicon: LLTokenizer) -> None:
        self._matcher = matcher
        self.lexicon = lexicon
        self.first: Future[Masks] = Future()
        """One row: what an answer may begin with."""
        self.first.set_result(_masks([matcher.deep_copy()], lexicon, LLExecutor(1)))

    def copy(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def after(self, text: str) -> "Grammar | None":
        """The grammar of what follows this text; None where no answer begins so."""
        tokens = self.lexicon.greedy_tokenize(text)
        if not tokens:
            return self
        matcher = self.copy()
        if matcher.validate_tokens(tokens) < len(tokens) or not matcher.consume_tokens(tokens):
            return None
        return Grammar(matcher, self.lexicon)


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the latest. Any thread but the model's."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos = sorted(eos_token_ids)
        self._one_at_a_time = threading.Lock()
        """So that compiling takes one core from the model, not all of them."""
        self._compiled = lru_cache(MAX_CACHED)(self._compile)

    def compile(self, kind: GrammarKind, source: object, where: str) -> Grammar:
        """The grammar of a JSON schema, a regular expression, a list of texts, or Lark or GBNF.

        An answer matches it as a whole. `where` names the source in errors. Raises BadConstraint,
        and ConstraintsUnavailable where the tokenizer cannot be constrained.
        """
        try:
            as_it_is = isinstance(source, str) and kind != "json"
            text = str(source) if as_it_is else json.dumps(source, allow_nan=False)
        except (ValueError, RecursionError) as error:
            raise BadConstraint(where, f"is no JSON: {error}", "write plain JSON") from error
        if len(text) > MAX_CHARACTERS:
            raise BadConstraint(
                where, f"has {len(text)} characters", f"keep it below {MAX_CHARACTERS}"
            )
        try:
            with self._one_at_a_time:
                return self._compiled(kind, text)
        except _Refused as refused:
            raise _explained(kind, text, str(refused), where) from refused

    @cached_property
    def _lexicon(self) -> LLTokenizer:
        """Made when first asked for: it takes a second, and most servers never need it."""
        try:
            return from_tokenizer(self._tokenizer, n_vocab=self._vocab, eos_token=self._eos)
        except ValueError as error:
            raise ConstraintsUnavailable(str(error)) from error

    def _compile(self, kind: GrammarKind, text: str) -> Grammar:
        lexicon = self._lexicon
        try:
            if problem := vet(kind, text):
                raise _Refused(problem)
            matcher = compiled(kind, text, lexicon)
        except (ValueError, RecursionError) as error:
            raise _Refused(error) from error
        if problem := error_of(matcher):
            raise _Refused(problem)
        grammar = Grammar(matcher, lexicon)
        if problem := grammar.first.result().errors[0]:
            raise _Refused(problem)
        return grammar


class Constraint:
    """How far one sequence has come in its grammar. Belongs to the model thread."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self._masks = grammar.first
        self._row = 0

    @cached_property
    def matcher(self) -> LLMatcher:
        """Of the mask maker's thread only."""
        return self._grammar.copy()

    @property
    def lexicon(self) -> LLTokenizer:
        return self._grammar.lexicon

    @property
    def allowed(self) -> torch.Tensor:
        """`[vocab]` bool: the tokens that may come next. Waits until that is known."""
        return self._masks.result().allowed[self._row]

    @property
    def error(self) -> str:
        """Why the grammar cannot go on; empty where it can. Waits as `allowed` does."""
        return self._masks.result().errors[self._row]

    def allows_others_than(self, tokens: frozenset[int]) -> bool:
        allowed = self.allowed
        return int(allowed.sum()) > int(allowed[list(tokens)].sum())

    def follow(self, masks: Future[Masks], row: int) -> None:
        self._masks, self._row = masks, row


class MaskMaker:
    """Makes the next masks of a batch while the model runs, on threads without the GIL."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        """One, so that a sequence's tokens are taken in order."""

    def advance(self, taken: Rows[tuple[Constraint, int]]) -> None:
        """Each of these sequences took this token. Returns at once."""
        masks = self._thread.submit(self._advance, taken)
        for row, (constraint, _) in enumerate(taken):
            constraint.follow(masks, row)

    def close(self) -> None:
        self._thread.shutdown()

    @cached_property
    def _executor(self) -> LLExecutor:
        return LLExecutor()

    def _advance(self, taken: Rows[tuple[Constraint, int]]) -> Masks:
        matchers = [constraint.matcher for constraint, _ in taken]
        tokens = [token for _, token in taken]
        self._executor.consume_token_par(list(zip(matchers, tokens, strict=True)))
        return _masks(matchers, taken[0][0].lexicon, self._executor)


def _masks(matchers: Rows[LLMatcher], lexicon: LLTokenizer, executor: LLExecutor) -> Masks:
    vocab = lexicon.vocab_size
    packed = allocate_token_bitmask(len(matchers), vocab)
    fill_next_token_bitmask_par(executor, [(m, row) for row, m in enumerate(matchers)], packed)
    bits = np.unpackbits(packed.view(np.uint8), axis=1, count=vocab, bitorder="little")
    return Masks(torch.from_numpy(bits.view(np.bool_)), [error_of(m) for m in matchers])


class _Refused(Exception):
    """llguidance's own words."""


def _explained(kind: GrammarKind, text: str, reason: str, where: str) -> BadConstraint:
    """What is wrong, and in a schema also where."""
    if kind != "json":
        return BadConstraint(where, reason, "mend or simplify it")
    unsupported = reason.removeprefix("Unimplemented keys: ")
    schema = json.loads(text)
    if unsupported != reason:
        keys = json.loads(unsupported)
        places = ", ".join(place for key in keys for place in _places(schema, key, "$"))
        return BadConstraint(where, f"uses what is not supported: {places}", "leave it out")
    rules = Draft202012Validator(Draft202012Validator.META_SCHEMA)
    fault = None
    with suppress(RecursionError):
        fault = best_match(rules.iter_errors(schema))
    if fault is not None:
        reason = f"is no JSON schema: at {fault.json_path}, {fault.message}"
    return BadConstraint(where, reason, "mend or simplify it")


def _places(schema: object, key: str, at: str) -> Iterator[str]:
    """Where in a schema `key` stands, as JSON paths."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _places(each, key, f"{at}[{index}]")
    if isinstance(schema, dict):
        for name, each in schema.items():
            if name == key:
                yield f"{at}.{key}"
            yield from _places(each, key, f"{at}.{name}")
