"""The engine's requests and outputs: plain values, no tensors, no HTTP."""

import math
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType

import regex

from infuse.adapters.residency import Lease
from infuse.server.engine.constraints.grammars import Grammar


class FinishReason(StrEnum):
    STOP = "stop"
    """An end token, a stop token or a stop string ended the answer."""
    LENGTH = "length"
    """The answer has `max_tokens` tokens, which the model's context length bounds."""
    CANCELLED = "cancelled"
    CONSTRAINT = "constraint"
    """The grammar became too complex while the answer was generated; `error` says how."""
    TIMEOUT = "timeout"
    """Its time was over. The API ends it, not the engine."""
    ERROR = "error"
    """This request failed; `error` says why."""
    ENGINE_DEAD = "engine_dead"
    """The engine died before the request had ended."""


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
    """Further tokens that end the answer, beside the model's own end tokens."""
    include_stop: bool = False
    """Keep the stop string, or the text of the token, that ended the answer at its end."""
    ignore_eos: bool = False
    """Go on past the model's end tokens (not past `stop_token_ids`)."""
    allowed_tokens: bytes | None = None
    """A `token_mask` of the only tokens that may be sampled. None: all may."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the answer never holds, unless its grammar leaves nothing else."""
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_from: int = 1
    grammar: Grammar | None = None
    """The whole answer must match it. An end token is allowed exactly where a match may end."""
    grammar_begin: "regex.Pattern[str] | None" = None
    """The grammar begins after the first match of this in the answer's text. None: at its start."""

    @property
    def is_penalised(self) -> bool:
        """Whether a token's logit depends on how often it has occurred."""
        additive = self.presence_penalty != 0 or self.frequency_penalty != 0
        return additive or self.repetition_penalty != 1


def token_mask(token_ids: Collection[int]) -> bytes:
    """For each token id, up to the greatest of these, a byte: 1 where it is one of them."""
    mask = bytearray(max(token_ids) + 1)
    for token in token_ids:
        mask[token] = 1
    return bytes(mask)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model's unfiltered distribution, and the best tokens'."""

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
    """Tokens that the answer of an encoder-decoder begins with."""
    params: SamplingParams
    lease: Lease | None = None
    adapter_name: str = ""
    """The adapter as the API call named it, `name` or `name@revision`; "" for the base and for
    mixtures."""
    tenant: str = ""
    """The tenant whose fair share of the model it uses. The adapters of a tenant have equal shares
    of its own."""
    weight: float = 1.0
    """The tenant's share beside others': with 2, twice as many tokens as a tenant with 1."""
    guaranteed: int = 0
    """The tokens a minute by which the tenant's requests start ahead of others'."""
    priority: int = 0
    """Among a tenant's requests, those with a lower value start earlier."""
    patience: float = field(default=math.inf, compare=False)
    """Seconds that it can wait for its start. Where the queue takes longer, by the engine's
    estimate, it is refused."""
    http_id: str = ""
    """The id of the HTTP request that it is of, by which the log names it."""
    submitted: float = field(default_factory=time.perf_counter, compare=False)
    """When it was made, by `time.perf_counter`."""
    order: str | None = None
    """The API call that the request belongs to. Requests of one call share their common prefix even
    without a prefix cache."""
    cache_salt: str = ""
    """Only requests with the same salt share prefixes."""
    speculation: bool | None = None
    """Whether tokens may be drafted. This changes how fast the answer comes, not its tokens. None:
    the engine's setting decides."""
    prediction: tuple[int, ...] = ()
    """The tokens of a text that the answer is expected to repeat; drafts are taken from it."""

    @property
    def adapter(self) -> str:
        """The label of its lease; "" for the base."""
        return "" if self.lease is None else self.lease.label


class WaitsFor(StrEnum):
    """What keeps a request from running."""

    TURN = "turn"
    """Others are before it in the queue."""
    ROW = "row"
    """Every row of the batch is taken."""
    SLOT = "slot"
    """Every slot of the bank is in use, and none has its adapter."""
    BLOCKS = "blocks"
    """The KV cache has no room for its prompt."""
    PREFIX = "prefix"
    """A running request computes how its prompt begins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """How far a request is that has not ended. Times are by `time.perf_counter`."""

    request: GenerationRequest
    is_running: bool = False
    waits_for: WaitsFor = WaitsFor.TURN
    """While it does not run."""
    answer_tokens: int = 0
    started: float | None = None
    """When it first ran. A waiting request that has it was preempted."""
    first_token: float | None = None


def adapter_names(requests: Iterable[GenerationRequest]) -> frozenset[str]:
    """The adapters that the requests name; not the base, and no mixtures."""
    return frozenset(request.adapter_name for request in requests) - {""}


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """The result of one step for one request.

    The texts of a request's outputs, joined, are its answer: a stop string never appears in them.
    `token_ids` may be ahead of `text`, while a character or a possible stop string is incomplete.
    The last output carries `finish_reason`; with ERROR and CONSTRAINT, `error` says why.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    started: float | None = field(default=None, compare=False)
    """On the first output: when the request first ran, by `time.perf_counter`."""
    lacked_slot: float | None = field(default=None, compare=False)
    """On the first output: when it was its turn and there was no slot for its adapter, if so."""
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """On the first output, if asked for: one per prompt token; None before the first scored one."""
    cached_tokens: int = 0
    """On the last output: how many tokens of the prompt were cached."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string, or the one of `stop_token_ids`, that ended the answer, if one did."""
    error: str = ""
    predicted_tokens: int = 0
    """On the last output: how many of the answer's tokens `prediction` predicted correctly."""
