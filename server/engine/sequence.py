"""A request on its way through the engine."""

import random

from transformers import PreTrainedTokenizerFast

from server.engine.constraints import Constraint
from server.engine.detokenizer import Detokenizer
from server.engine.request import GenerationRequest, TokenLogprob


class Sequence:
    """Owns a request's tokens and how far they are computed.

    `tokens` holds prompt and answer; keys and values exist for the first `computed` of them. A
    preempted sequence goes back to 0 and recomputes; its answer, its random state and its place in
    a grammar stay.
    """

    def __init__(
        self, request: GenerationRequest, row: int, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.request = request
        self.row = row
        """The engine's own number for this request: names its keys and values in the cache."""
        self.tokens = list(request.prompt)
        self.computed = 0
        self.slot: int | None = None
        """The adapter's slot while the sequence runs; None while it waits."""
        self.rng = random.Random(request.params.seed)
        self.detokenizer = Detokenizer(
            tokenizer, request.prompt, request.params.stop, request.params.skip_special_tokens
        )
        grammar = request.params.grammar
        self.constraint = None if grammar is None else Constraint(grammar)
        self.prompt_logprobs: list[TokenLogprob | None] = [None]
        """Known so far, when they were asked for. Nothing predicts the first token."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    @property
    def answer_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def uncomputed(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        asked = self.request.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.prompt_tokens
