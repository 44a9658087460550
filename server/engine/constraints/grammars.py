"""Constrained answers: compiles grammars by llguidance.

A grammar is compiled once for all requests that ask for it at that time, not on the model thread,
and in turns among tenants. Each sequence follows it with a matcher of its own.
"""

import asyncio
import hashlib
import json
import math
import time
from collections import abc
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from transformers import PreTrainedTokenizerFast

from infuse.server.engine.constraints.kept import Key, Latest
from infuse.server.engine.constraints.vetting import (
    NICENESS,
    GrammarKind,
    compiled,
    error_of,
)
from infuse.server.engine.constraints.vetting_process import REST, TOO_BUSY, Slow, Vetting, rest
from infuse.server.engine.errors import BadConstraint, ConstraintsUnavailable
from infuse.server.engine.fair_turns import FairTurns
from infuse.server.engine.threads import on_passing_thread

MAX_CHARACTERS = 1 << 16
"""The most characters of a grammar's source. More take seconds to compile."""
MAX_CACHED = 64
"""The most grammars that are kept."""
MAX_REFUSALS = 1024
"""The most refusals that are kept."""
MAX_WAITING = 32
"""The most grammars of one tenant that wait to be compiled."""
_AT_ONCE = 2
"""How many grammars, of different tenants, are compiled at once. More would take too many
processors from the model."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Masks:
    """The tokens that the grammars of some rows allow next."""

    allowed: torch.Tensor
    """`[rows, vocab]` bool, on the CPU."""
    errors: list[str]
    """For each row, why its grammar cannot continue; empty if it can."""


class Grammar:
    """A compiled constraint. It is immutable: every sequence follows a copy."""

    def __init__(
        self, kind: GrammarKind, source: str, matcher: LLMatcher, lexicon: LLTokenizer
    ) -> None:
        """`source`: what it was compiled from, for engines that compile it themselves."""
        self.kind: GrammarKind = kind
        self.source = source
        self._matcher = matcher
        self.lexicon = lexicon
        self.first: Future[Masks] = Future()
        """The mask of an answer's first token, as one row."""
        self.first.set_result(masks_of([matcher.deep_copy()], lexicon, LLExecutor(1)))

    def copy(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def after(self, text: str) -> "Grammar | None":
        """The grammar of the rest after this text. None: no answer begins with it."""
        tokens = self.lexicon.greedy_tokenize(text)
        if not tokens:
            return self
        matcher = self.copy()
        if matcher.validate_tokens(tokens) < len(tokens) or not matcher.consume_tokens(tokens):
            return None
        return Grammar(self.kind, self.source, matcher, self.lexicon)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a source was refused. It is the same for all requests with this source."""

    problem: str
    fix: str


class GrammarMissing(Exception):
    """A grammar must be compiled first, by `RequestGrammars.compile`. Then ask again."""

    def __init__(self, kind: GrammarKind, text: str) -> None:
        self.kind: GrammarKind = kind
        self.text = text


class _Job:
    """A running compilation, and how many requests wait for it."""

    def __init__(self, task: "asyncio.Task[Grammar | Refusal]") -> None:
        self.task = task
        self.wanted = 0


class Grammars:
    """Compiles constraints for one tokenizer, and keeps the latest.

    `make` is for one event loop, all other methods for any thread except the model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        vocab: int,
        eos_token_ids: frozenset[int],
        is_busy: abc.Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_busy`: whether the model is in use, which slow grammars give way to."""
        self._is_busy = is_busy
        self._lexicon: LLTokenizer | None = None
        self._unavailable = ""
        """Why the tokenizer cannot be constrained."""
        try:
            # Not on first use: for the second that it takes, it lets no other thread run Python.
            self._lexicon = from_tokenizer(tokenizer, vocab, sorted(eos_token_ids))
        except Exception as error:
            self._unavailable = str(error)
        self._vetting = Vetting()
        self._grammars = Latest[Grammar](MAX_CACHED)
        self._refusals = Latest[Refusal](MAX_REFUSALS)
        self._jobs: dict[Key, _Job] = {}
        self._tenant_turns = FairTurns(math.inf, each=1, waiting=MAX_WAITING)
        self._turns = FairTurns(_AT_ONCE, each=1)
        self._slow_turns = FairTurns(1, each=1, waiting=MAX_WAITING)

    def compile(self, kind: GrammarKind, source: object, where: str) -> Grammar:
        """The grammar of a JSON schema, a regular expression, a list of texts, or Lark or GBNF.

        An answer matches it as a whole. `where` names the source in errors. Raises BadConstraint,
        and ConstraintsUnavailable if the tokenizer cannot be constrained. Within
        `RequestGrammars.asked` it does not wait, but raises GrammarMissing.
        """
        text = _text_of(kind, source, where)
        request = _REQUEST.get()
        if request is not None:
            result = request.find(kind, text)
        else:
            known = self.find("", kind, text)
            result = asyncio.run(self.make("", "", kind, text)) if known is None else known
        if isinstance(result, Refusal):
            raise BadConstraint(where, result.problem, result.fix)
        return result

    def find(self, scope: str, kind: GrammarKind, text: str) -> "Grammar | Refusal | None":
        """The kept grammar or refusal of this source. None: there is none."""
        key = _key(scope, kind, text)
        return self._grammars.get(key) or self._refusals.get(key)

    async def make(
        self, tenant: str, scope: str, kind: GrammarKind, text: str
    ) -> "Grammar | Refusal":
        """Compile a grammar when it is the tenant's turn, once for all requests that wait for it.

        The compilation stops when all of these were cancelled. Raises ConstraintsUnavailable and
        QueueFull.
        """
        key = _key(scope, kind, text)
        if key not in self._jobs:
            self._jobs[key] = _Job(asyncio.create_task(self._make(tenant, key, text)))
        job = self._jobs[key]
        job.wanted += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.wanted -= 1
            if not job.wanted:
                job.task.cancel()
                if self._jobs.get(key) is job:
                    del self._jobs[key]

    async def _make(self, tenant: str, key: Key, text: str) -> "Grammar | Refusal":
        if self._lexicon is None:
            raise ConstraintsUnavailable(self._unavailable)
        lexicon = self._lexicon
        try:
            async with self._tenant_turns.turn(tenant):
                result = await self._make_quickly(tenant, key, text, lexicon)
        except Slow:
            async with self._slow_turns.turn(tenant):
                problem = await self._vetting.vet_slowly(key.kind, text, self._is_busy)
                work = partial(_compile, key.kind, text, lexicon, problem)
                result = await _run_to_the_end(partial(on_passing_thread, work, NICENESS))
        if isinstance(result, Refusal) and result.problem == TOO_BUSY:
            # Not kept: the machine may be busy only now.
            return result
        if isinstance(result, Grammar):
            self._grammars.put(key, result)
        else:
            self._refusals.put(key, result)
        return result

    async def _make_quickly(
        self, tenant: str, key: Key, text: str, lexicon: LLTokenizer
    ) -> "Grammar | Refusal":
        """Raises Slow, when its tenant has rested."""
        began = time.monotonic()
        try:
            async with self._turns.turn(tenant):
                began = time.monotonic()
                problem = await self._vetting.vet(key.kind, text)
                return await _run_to_the_end(partial(_compile, key.kind, text, lexicon, problem))
        except Slow:
            # A tenant whose grammars are all slow takes no more of the model's time by their tries.
            await rest(REST * (time.monotonic() - began), self._is_busy)
            raise


class RequestGrammars:
    """The grammars of one request. It keeps what was compiled for the request."""

    def __init__(self, grammars: Grammars, tenant: str, scope: str) -> None:
        """`scope`: requests of one scope share kept grammars."""
        self._grammars = grammars
        self._tenant = tenant
        self._scope = scope
        self._given: dict[tuple[GrammarKind, str], Grammar | Refusal] = {}

    @contextmanager
    def asked(self) -> abc.Iterator[None]:
        """Make `Grammars.compile` find this request's grammars, in this context and in threads that
        are started in it."""
        token = _REQUEST.set(self)
        try:
            yield
        finally:
            _REQUEST.reset(token)

    def find(self, kind: GrammarKind, text: str) -> Grammar | Refusal:
        """The kept grammar or refusal of this source. Raises GrammarMissing."""
        known = self._given.get((kind, text)) or self._grammars.find(self._scope, kind, text)
        if known is None:
            raise GrammarMissing(kind, text)
        self._given[kind, text] = known
        return known

    async def compile(self, missing: GrammarMissing) -> None:
        """Compile a missing grammar for this request. Raises ConstraintsUnavailable, QueueFull."""
        kind, text = missing.kind, missing.text
        self._given[kind, text] = await self._grammars.make(self._tenant, self._scope, kind, text)


_REQUEST: ContextVar[RequestGrammars | None] = ContextVar("request", default=None)


def _key(scope: str, kind: GrammarKind, text: str) -> Key:
    return Key(scope, kind, hashlib.sha256(text.encode(errors="surrogatepass")).digest())


def _text_of(kind: GrammarKind, source: object, where: str) -> str:
    try:
        as_it_is = isinstance(source, str) and kind != "json"
        text = str(source) if as_it_is else json.dumps(source, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadConstraint(where, f"is no JSON: {error}", "write plain JSON") from error
    if len(text) > MAX_CHARACTERS:
        raise BadConstraint(where, f"has {len(text)} characters", f"keep it below {MAX_CHARACTERS}")
    return text


async def _run_to_the_end(work: abc.Callable[[], _T]) -> _T:
    """Run `work` on a thread. It cannot be stopped, so a cancelled caller waits for it too."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(thread)
    finally:
        if not thread.done():
            await asyncio.wait([thread])


def masks_of(
    matchers: abc.Sequence[LLMatcher], lexicon: LLTokenizer, executor: LLExecutor
) -> Masks:
    """The tokens that each matcher allows next."""
    vocab = lexicon.vocab_size
    packed = allocate_token_bitmask(len(matchers), vocab)
    fill_next_token_bitmask_par(executor, [(m, row) for row, m in enumerate(matchers)], packed)
    bits = np.unpackbits(packed.view(np.uint8), axis=1, count=vocab, bitorder="little")
    return Masks(torch.from_numpy(bits.view(np.bool_)), [error_of(m) for m in matchers])


def _compile(
    kind: GrammarKind, text: str, lexicon: LLTokenizer, problem: str
) -> "Grammar | Refusal":
    """Compile a source, or explain the `problem` that vetting has found. Blocks."""
    if problem:
        return _explained(kind, text, problem)
    try:
        matcher = compiled(kind, text, lexicon)
    except (ValueError, RecursionError) as error:
        return _explained(kind, text, str(error))
    if problem := error_of(matcher):
        return _explained(kind, text, problem)
    grammar = Grammar(kind, text, matcher, lexicon)
    if problem := grammar.first.result().errors[0]:
        return _explained(kind, text, problem)
    return grammar


def _explained(kind: GrammarKind, text: str, reason: str) -> Refusal:
    """A refusal with llguidance's reason and, for a JSON schema, the path of the fault."""
    if kind != "json":
        return Refusal(reason, "mend or simplify it")
    unsupported = reason.removeprefix("Unimplemented keys: ")
    schema = json.loads(text)
    if unsupported != reason:
        keys = json.loads(unsupported)
        places = ", ".join(place for key in keys for place in _places(schema, key, "$"))
        return Refusal(f"uses what is not supported: {places}", "leave it out")
    rules = Draft202012Validator(Draft202012Validator.META_SCHEMA)
    fault = None
    with suppress(RecursionError):
        fault = best_match(rules.iter_errors(schema))
    if fault is not None:
        reason = f"is no JSON schema: at {fault.json_path}, {fault.message}"
    return Refusal(reason, "mend or simplify it")


def _places(schema: object, key: str, at: str) -> abc.Iterator[str]:
    """The JSON paths of all occurrences of `key` in a schema."""
    if isinstance(schema, list):
        for index, each in enumerate(schema):
            yield from _places(each, key, f"{at}[{index}]")
    if isinstance(schema, dict):
        for name, each in schema.items():
            if name == key:
                yield f"{at}.{key}"
            yield from _places(each, key, f"{at}.{name}")
