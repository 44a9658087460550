"""A sequence: a request's tokens and state in the engine."""

import math
import random
import time
from collections import abc, deque

from transformers import PreTrainedTokenizerFast

from infuse.server.engine.detokenizer import Detokenizer
from infuse.server.engine.fair_queue import HEADROOM
from infuse.server.engine.native.sequences.constraint import Constraint
from infuse.server.engine.native.sequences.drafting import Drafter
from infuse.server.engine.request import GenerationRequest, TokenLogprob

_MARK = 256
"""The most characters of a match that begins a grammar."""


class Draws:
    """A sequence's own random numbers, uniform in [0, 1): one for each token that it samples."""

    def __init__(self, seed: int | None) -> None:
        self._generator = random.Random(seed)
        self._next: deque[float] = deque()

    def peek(self, ahead: int) -> float:
        """The random number for the next token (`ahead` 0), the token after it (1), …"""
        while len(self._next) <= ahead:
            self._next.append(self._generator.random())
        return self._next[ahead]

    def take(self, count: int) -> None:
        """Consume the numbers of this many tokens, which were sampled with `peek`."""
        for _ in range(count):
            self._next.popleft()


class Sequence:
    """Owns a request's tokens and how far they are computed.

    `tokens` holds prompt and answer; keys and values exist for the first `computed` of them. A
    preempted sequence goes back to 0 and is computed again, but keeps its answer, its random state
    and the state of its grammar. In an encoder-decoder the encoder reads the prompt, and the tokens
    that the decoder begins with stand between prompt and answer.
    """

    def __init__(
        self,
        request: GenerationRequest,
        seq_id: int,
        tokenizer: PreTrainedTokenizerFast,
        decoder_start: tuple[int, ...] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`decoder_start`: the tokens that the decoder of an encoder-decoder begins with.
        `drafter`: None if no tokens are drafted."""
        self.request = request
        self.seq_id = seq_id
        """The engine's number for this sequence, in order of arrival. It names the sequence's keys
        and values in the cache."""
        start = decoder_start or ()
        self.source_tokens = 0 if decoder_start is None else len(request.prompt)
        """How many of the first `tokens` an encoder reads, always as a whole."""
        self.tokens = [*request.prompt, *start, *request.target]
        self.prompt_tokens = len(self.tokens)
        self.computed = 0
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were a prefix hit; None until the sequence first runs."""
        self.slot: int | None = None
        """The adapter's slot while the sequence runs; None while it waits."""
        self.turn: int | None = None
        """The number of the sequence's first start among all starts. None: it has not started."""
        self.started: float | None = None
        """When the sequence first started, by `time.perf_counter`."""
        self.lacked_slot: float | None = None
        """When it was its turn, before it first started, and no slot was free for its adapter."""
        self.first_token: float | None = None
        """When the first token of the answer was appended."""
        self.preempted = False
        """Whether it was ever preempted."""
        self.draws = Draws(request.params.seed)
        self.drafter = drafter
        self.detokenizer = Detokenizer(
            tokenizer,
            request.prompt if decoder_start is None else (),
            request.params.stop,
            request.params.skip_special_tokens,
            request.params.include_stop,
        )
        grammar = request.params.grammar
        self._awaits_grammar = request.params.grammar_begin is not None
        self._text = ""
        """The end of the answer's text while its grammar has not begun: as much as a match may need
        and one character before it, so that `^` does not match in the middle of the text."""
        self.constraint = None if grammar is None or self._awaits_grammar else Constraint(grammar)
        self.prompt_logprobs: list[TokenLogprob | None] = [
            None
        ] * request.params.prompt_logprobs_from
        """The scores known so far, if the request wants them. The first token never has one."""

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def adapter(self) -> str:
        return self.request.adapter

    @property
    def has_started(self) -> bool:
        return self.turn is not None

    @property
    def rank(self) -> tuple[bool, int, float, int]:
        """The sequence's rank; the running sequence with the largest is preempted first.

        Sequences that were preempted before rank before all others. So the first of them is never
        preempted again.
        """
        turn = math.inf if self.turn is None else self.turn
        return not self.preempted, 0 if self.preempted else self.request.priority, turn, self.seq_id

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def begin(self, computed: int) -> None:
        """Note that the cache has room for the sequence, and holds its first `computed` tokens."""
        self.computed = computed
        if self.cached_tokens is None:
            self.cached_tokens = computed

    def start(self, slot: int, turn: int) -> None:
        """Run, for the first time or again, with the adapter in this slot."""
        self.slot = slot
        if self.turn is None:
            self.turn = turn
            self.started = time.perf_counter()

    def lack_slot(self) -> None:
        """Note that no slot is free for its adapter."""
        if self.turn is None and self.lacked_slot is None:
            self.lacked_slot = time.perf_counter()

    def preempt(self) -> None:
        """Wait again, without a row: all tokens must be computed again."""
        self.slot = None
        self.computed = 0
        self.preempted = True

    def advance(self, tokens: int) -> None:
        """Note that the keys and values of the next `tokens` tokens have been computed."""
        self.computed += tokens

    def append(self, token: int) -> None:
        """Append the answer's next token."""
        self.tokens.append(token)
        if self.first_token is None:
            self.first_token = time.perf_counter()

    def score_prompt(self, scores: abc.Sequence[TokenLogprob | None]) -> None:
        """Append the scores of the prompt's next tokens that had none."""
        self.prompt_logprobs += scores

    def see(self, text: str) -> None:
        """Read the answer's next text, in which its grammar may begin."""
        if not self._awaits_grammar or not text:
            return
        params = self.request.params
        assert params.grammar is not None
        assert params.grammar_begin is not None
        self._text += text
        found = params.grammar_begin.search(self._text, max(0, len(self._text) - len(text) - _MARK))
        if found is None:
            self._text = self._text[-_MARK - 1 :]
            return
        self._awaits_grammar = False
        rest = params.grammar.after(self._text[found.end() :])
        # If the rest of this token's text does not fit the grammar, the answer stays unconstrained.
        self.constraint = None if rest is None else Constraint(rest)

    @property
    def may_stop(self) -> bool:
        """Whether `min_tokens` allows a stop string in the text of the latest token."""
        return self.answer_tokens > self.request.params.min_tokens

    @property
    def stop_reason(self) -> str | int | None:
        """What stopped the answer: a stop string, or one of `stop_token_ids`."""
        last = self.tokens[-1]
        is_stop_token = last in self.request.params.stop_token_ids
        return self.detokenizer.stopped_by or (last if is_stop_token else None)

    @property
    def used_tokens(self) -> int:
        """Tokens of prompt and answer, without those that were cached."""
        return len(self.tokens) - (self.cached_tokens or 0)

    @property
    def charge(self) -> int:
        """Tokens that the sequence is charged while it runs, as `FairQueue` counts them."""
        reserved = min(self.request.params.max_tokens, HEADROOM)
        return max(self.used_tokens, self.used_tokens - self.answer_tokens + reserved)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def predicted_tokens(self) -> int:
        """How many of the answer's tokens the request's prediction had right."""
        if not self.request.prediction or self.drafter is None:
            return 0
        self.drafter.read(self.tokens)
        return self.drafter.predicted_tokens

    def unscored(self, tokens: int) -> range:
        """Which of the next `tokens` tokens predict a prompt token that has no score yet."""
        if not self.wants_prompt_logprobs:
            return range(0)
        first = len(self.prompt_logprobs) - 1 - self.computed
        return range(first, min(tokens, self.prompt_tokens - 1 - self.computed))

    @property
    def wants_prompt_logprobs(self) -> bool:
        asked = self.request.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.prompt_tokens

    @property
    def sharable(self) -> list[int]:
        """The tokens whose prefixes may be shared: all, or in an encoder-decoder the source."""
        return self.tokens[: self.source_tokens] if self.source_tokens else self.tokens

    @property
    def most_skippable(self) -> int:
        """How many tokens can be prefix hits: all but the last, which predicts the next token."""
        return self.source_tokens or len(self.tokens) - 1

    @property
    def skippable(self) -> int:
        """Likewise, but the tokens that score the prompt must be computed."""
        if self.source_tokens or not self.wants_prompt_logprobs:
            return self.most_skippable
        return len(self.prompt_logprobs) - 1

    def can_take_scores(self, other: "Sequence") -> bool:
        """Whether another sequence with the same prompt scores all tokens that this one wants."""
        ours, theirs = self.request.params, other.request.params
        return not self.wants_prompt_logprobs or (
            ours.prompt_logprobs == theirs.prompt_logprobs
            and theirs.prompt_logprobs_from <= len(self.prompt_logprobs)
        )

    def take_scores(self, other: "Sequence") -> None:
        """Copy another sequence's scores as far as the two prompts agree."""
        if not self.wants_prompt_logprobs or not self.can_take_scores(other):
            return
        ours, theirs = self.tokens[: self.prompt_tokens], other.tokens[: other.prompt_tokens]
        common = common_tokens(ours, theirs)
        self.score_prompt(other.prompt_logprobs[len(self.prompt_logprobs) : common])


def common_tokens(some: abc.Sequence[int], others: abc.Sequence[int]) -> int:
    """The length of the common prefix."""
    if some == others:
        return len(some)
    pairs = enumerate(zip(some, others, strict=False))
    unlike = (number for number, (one, other) in pairs if one != other)
    return next(unlike, min(len(some), len(others)))
