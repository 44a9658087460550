"""What the engine is asked and what it answers: plain values, no tensors, no HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import regex

from adapters.residency import Lease
from server.engine.constraints.grammars import Grammar


class FinishReason(StrEnum):
    STOP = "stop"
    """An end token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the end of the model's window."""
    CANCELLED = "cancelled"
    CONSTRAINT = "constraint"
    """The grammar became too complex on the way; `error` says how."""
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. The defaults sample the model's own distribution.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off; `temperature` 0 is greedy. `logprobs` is how many
    alternatives to report beside each token (None: no logprobs at all). With `prompt_logprobs`
    the prompt's own tokens are scored too, from the token `prompt_logprobs_from` on.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    """Further tokens that end the text, beside the model's own end tokens."""
    include_stop: bool = False
    """What ended the text, a stop string or the text of a token, stands at its end."""
    ignore_eos: bool = False
    """Go on past the model's end tokens (not past `stop_token_ids`)."""
    allowed_token_ids: frozenset[int] | None = None
    """No others come; None: all may."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Rows of tokens that the answer never holds, unless its grammar leaves nothing else."""
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    grammar: Grammar | None = None
    """What the answer must match as a whole. The end token comes exactly where it may end."""
    grammar_begin: "regex.Pattern[str] | None" = None
    """Where in the answer's text the grammar begins: behind the first match. None: at its start."""

    @property
    def is_penalised(self) -> bool:
        """Whether a token's chance depends on how often it has come."""
        additive = self.presence_penalty != 0 or self.frequency_penalty != 0
        return additive or self.repetition_penalty != 1


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's natural-log probability under the model's unfiltered distribution, and the best."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt to continue. The engine releases the lease when the request ends, however it ends.

    `lease` None is the base model.
    """

    id: str
    prompt: tuple[int, ...]
    target: tuple[int, ...] = ()
    """For an encoder-decoder: tokens that its answer begins with."""
    params: SamplingParams
    lease: Lease | None = None
    tenant: str = ""
    """The one whose fair share of the model it uses. Tenants have equal shares, as have a tenant's
    adapters."""
    priority: int = 0
    """A tenant's requests with a lower one are served earlier."""
    order: str | None = None
    """Requests of one order share what they have in common, with or without a prefix cache."""
    cache_salt: str = ""
    """Only requests with the same salt share."""
    speculation: bool | None = None
    """Whether tokens may be drafted, which changes when they come and not which; None: the engine's
    setting decides."""
    prediction: tuple[int, ...] = ()
    """What the answer is expected to be: drafts are taken from it."""

    @property
    def adapter(self) -> str:
        """What its lease is called; "" for the base."""
        return "" if self.lease is None else self.lease.label


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What one step brought for one request.

    The texts of a request's outputs, joined, are its answer: a stop string never appears in them.
    `token_ids` may be ahead of `text`, while a character or a possible stop string is incomplete.
    The last output carries `finish_reason`; with ERROR and CONSTRAINT,
    `error` says why.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One per prompt token (None before the first that is scored); on the first output only, when
    asked for."""
    cached_tokens: int = 0
    """How many tokens of the prompt were cached. On the last output."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the one of `stop_token_ids`, that ended the answer, if one did."""
    error: str = ""
    predicted_tokens: int = 0
    """On the last output: how many of the answer's tokens its request's prediction foretold."""
