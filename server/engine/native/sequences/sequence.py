"""A request on its way through the engine."""

import math
import random
from collections import abc, deque

from transformers import PreTrainedTokenizerFast

from server.engine.constraints.grammars import Constraint
from server.engine.native.sequences.detokenizer import Detokenizer
from server.engine.native.sequences.drafting import Drafter
from server.engine.request import GenerationRequest, TokenLogprob

_MARK = 256
"""Characters of what begins a grammar, at most."""
HEADROOM = 64
"""Tokens of the answer that admission sets aside room for, so that a row seldom moves at once."""


class Draws:
    """A sequence's own random numbers, uniform in [0, 1): one for each token that it takes."""

    def __init__(self, seed: int | None) -> None:
        self._generator = random.Random(seed)
        self._next: deque[float] = deque()

    def peek(self, ahead: int) -> float:
        """The number for the next token (0), the one after it (1), …"""
        while len(self._next) <= ahead:
            self._next.append(self._generator.random())
        return self._next[ahead]

    def take(self, count: int) -> None:
        """So many tokens were taken by numbers that `peek` gave."""
        for _ in range(count):
            self._next.popleft()


class Sequence:
    """Owns a request's tokens and how far they are computed.

    `tokens` holds prompt and answer; keys and values exist for the first `computed` of them. A
    preempted sequence goes back to 0 and recomputes; its answer, its random state and its place in
    a grammar stay. In an encoder-decoder the prompt is the encoder's, and what the decoder begins
    with stands between prompt and answer.
    """

    def __init__(
        self,
        request: GenerationRequest,
        row: int,
        tokenizer: PreTrainedTokenizerFast,
        decoder_start: tuple[int, ...] | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        """`decoder_start`: what the decoder of an encoder-decoder begins with. `drafter`: what
        drafts its next tokens; None: they are not drafted."""
        self.request = request
        self.row = row
        """The engine's own number for this request: names its keys and values in the cache."""
        start = decoder_start or ()
        self.source_tokens = 0 if decoder_start is None else len(request.prompt)
        """The first of `tokens`, which an encoder reads, and only as a whole."""
        self.tokens = [*request.prompt, *start, *request.target]
        self.prompt_tokens = len(self.tokens)
        self.computed = 0
        self.cached_tokens: int | None = None
        """Tokens of the prompt that were a prefix hit; None until the sequence first runs."""
        self.slot: int | None = None
        """The adapter's slot while the sequence runs; None while it waits."""
        self.turn: int | None = None
        """The number of its first start among all starts; None: it has not started."""
        self.preempted = False
        """Whether it ever was."""
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
        """The answer's end, while its grammar has not begun: as much as may belong to the mark, and
        one character before it, so that no pattern takes a later place for the start."""
        self.constraint = None if grammar is None or self._awaits_grammar else Constraint(grammar)
        self.prompt_logprobs: list[TokenLogprob | None] = [
            None
        ] * request.params.prompt_logprobs_from
        """Known so far, when they were asked for. Nothing predicts the first token."""

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
        """The running sequence with the largest is preempted first. One that was preempted comes
        before all that were not, and the first of those is never preempted again."""
        turn = math.inf if self.turn is None else self.turn
        return not self.preempted, 0 if self.preempted else self.request.priority, turn, self.row

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def begin(self, computed: int) -> None:
        """A row of the cache is the sequence's, which holds its first `computed` tokens already."""
        self.computed = computed
        if self.cached_tokens is None:
            self.cached_tokens = computed

    def start(self, slot: int, turn: int) -> None:
        """The sequence runs, for the first time or again, on the adapter in this slot."""
        self.slot = slot
        if self.turn is None:
            self.turn = turn

    def preempt(self) -> None:
        """Its row is taken away, so that all of it is to be computed again."""
        self.slot = None
        self.computed = 0
        self.preempted = True

    def advance(self, tokens: int) -> None:
        """Keys and values of its next `tokens` tokens have been computed."""
        self.computed += tokens

    def append(self, token: int) -> None:
        """This is the answer's next token."""
        self.tokens.append(token)

    def score_prompt(self, scores: abc.Sequence[TokenLogprob | None]) -> None:
        """These are the scores of the prompt's next tokens that had none."""
        self.prompt_logprobs += scores

    def see(self, text: str) -> None:
        """The answer goes on with this text, in which its grammar may begin."""
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
        # Where the same token went on as the grammar does not, the answer stays free.
        self.constraint = None if rest is None else Constraint(rest)

    @property
    def may_stop(self) -> bool:
        """Whether `min_tokens` allows a stop string in the text of the latest token."""
        return self.answer_tokens > self.request.params.min_tokens

    @property
    def stop_reason(self) -> str | int | None:
        """What ended an answer that was stopped: a stop string, or one of `stop_token_ids`."""
        last = self.tokens[-1]
        is_stop_token = last in self.request.params.stop_token_ids
        return self.detokenizer.stopped_by or (last if is_stop_token else None)

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def predicted_tokens(self) -> int:
        """How many of the answer's tokens the request's prediction foretold."""
        if not self.request.prediction or self.drafter is None:
            return 0
        self.drafter.read(self.tokens)
        return self.drafter.predicted_tokens

    def unscored(self, tokens: int) -> range:
        """Which of the next `tokens` tokens predict one of the prompt that has no score yet."""
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
        """What others may begin with as well: all, or of an encoder-decoder its source."""
        return self.tokens[: self.source_tokens] if self.source_tokens else self.tokens

    @property
    def most_skippable(self) -> int:
        """How many tokens need not be computed where their keys and values are there already: all
        but the last one, which says what comes next."""
        return self.source_tokens or len(self.tokens) - 1

    @property
    def skippable(self) -> int:
        """The same, but for what scores the prompt."""
        if self.source_tokens or not self.wants_prompt_logprobs:
            return self.most_skippable
        return len(self.prompt_logprobs) - 1

    def can_take_scores(self, other: "Sequence") -> bool:
        """Whether another scores all that this one wants scored, where their prompts are alike."""
        ours, theirs = self.request.params, other.request.params
        return not self.wants_prompt_logprobs or (
            ours.prompt_logprobs == theirs.prompt_logprobs
            and theirs.prompt_logprobs_from <= len(self.prompt_logprobs)
        )

    def take_scores(self, other: "Sequence") -> None:
        """Where their prompts are alike, the other's scores are this one's as well."""
        if not self.wants_prompt_logprobs or not self.can_take_scores(other):
            return
        ours, theirs = self.tokens[: self.prompt_tokens], other.tokens[: other.prompt_tokens]
        common = common_tokens(ours, theirs)
        self.score_prompt(other.prompt_logprobs[len(self.prompt_logprobs) : common])


def common_tokens(some: abc.Sequence[int], others: abc.Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    if some == others:
        return len(some)
    pairs = enumerate(zip(some, others, strict=False))
    unlike = (number for number, (one, other) in pairs if one != other)
    return next(unlike, min(len(some), len(others)))
