"""Turns a request's body into the engine's sampling parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers import GenerationConfig

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.constraining import FREE, Held
from infuse.server.api.prompts import shown
from infuse.server.api.schemas import GenerationBody
from infuse.server.engine import ServedModel
from infuse.server.engine.request import SamplingParams, token_mask
from infuse.server.errors import ApiError

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0: dividing logits by them would overflow."""


@dataclass(frozen=True)
class SamplingDefaults:
    """How a request is sampled that does not say how."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, config: GenerationConfig | None) -> "SamplingDefaults":
        """The model's own where its `generation_config` says `do_sample`; OpenAI's otherwise."""
        if config is None or not config.do_sample:
            return cls()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        said = {name: getattr(config, name, None) for name in names}
        return cls(**{name: value for name, value in said.items() if value is not None})


_T = TypeVar("_T")


def _chosen(asked: _T | None, default: _T) -> _T:
    return default if asked is None else asked


def sampling_params(
    model: ServedModel,
    vocabulary: Vocabulary,
    body: GenerationBody,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    held: Held = FREE,
) -> SamplingParams:
    """The parameters of a prompt's first choice. Raises ApiError 400."""
    defaults = SamplingDefaults.of(model.generation_config)
    temperature = _chosen(body.temperature, defaults.temperature)
    top_k = _chosen(body.top_k, defaults.top_k)
    top_p = _chosen(body.top_p, defaults.top_p)
    bad_words = _bad_words(vocabulary, body)
    is_greedy = temperature < GREEDY_BELOW or top_p == 0
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=_min_tokens(body, max_tokens),
        temperature=0.0 if is_greedy else temperature,
        top_k=min(max(top_k, 0), vocabulary.size),
        top_p=top_p,
        min_p=_chosen(body.min_p, defaults.min_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_chosen(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=_logit_bias(vocabulary, body),
        seed=body.seed,
        stop=tuple(body.stop or ()),
        stop_token_ids=_stop_token_ids(model, vocabulary, body),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        allowed_tokens=_allowed_tokens(vocabulary, body, _never(model, body, bad_words)),
        bad_words=bad_words,
        skip_special_tokens=_chosen(body.skip_special_tokens, True),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=held.grammar,
        grammar_begin=held.begin,
    )


def _min_tokens(body: GenerationBody, max_tokens: int) -> int:
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise ApiError(
            400,
            f"min_tokens is {shown(min_tokens)} but at most {max_tokens} tokens are generated; "
            "lower it or raise max_tokens.",
            param="min_tokens",
        )
    return min_tokens


def _logit_bias(vocabulary: Vocabulary, body: GenerationBody) -> dict[int, float]:
    bias = body.logit_bias or {}
    for token in bias:
        _check_token(vocabulary, token, "logit_bias")
    return bias


def _stop_token_ids(
    model: ServedModel, vocabulary: Vocabulary, body: GenerationBody
) -> frozenset[int]:
    for token in body.stop_token_ids or ():
        _check_token(vocabulary, token, "stop_token_ids")
    stops = set(body.stop_token_ids or ())
    # The engine knows where the base ends; an adapter's tokenizer may end with a token of its own.
    end = vocabulary.tokenizer.eos_token_id
    is_own = end != model.tokenizer.eos_token_id
    if is_own and isinstance(end, int) and not body.ignore_eos:
        stops.add(end)
    return frozenset(stops)


def _never(
    model: ServedModel, body: GenerationBody, bad_words: Sequence[tuple[int, ...]]
) -> frozenset[int]:
    """The tokens that cannot be the answer's first."""
    never = {word[0] for word in bad_words if len(word) == 1}
    if body.min_tokens:
        never |= model.eos_token_ids | set(body.stop_token_ids or ())
    return frozenset(never)


def _allowed_tokens(
    vocabulary: Vocabulary, body: GenerationBody, never: frozenset[int]
) -> bytes | None:
    if body.allowed_token_ids is None:
        return None
    if len(body.allowed_token_ids) > vocabulary.size:
        raise ApiError(
            400,
            f"allowed_token_ids has {len(body.allowed_token_ids)} token ids; this model has only "
            f"{vocabulary.size}. Name each once.",
            param="allowed_token_ids",
        )
    for token in body.allowed_token_ids:
        _check_token(vocabulary, token, "allowed_token_ids")
    if body.is_constrained:
        raise ApiError(
            400,
            "allowed_token_ids and a format, a constraint or tools exclude each other; leave one "
            "out.",
            param="allowed_token_ids",
        )
    if never.issuperset(body.allowed_token_ids):
        raise ApiError(
            400,
            "allowed_token_ids leaves nothing beside bad_words and the end tokens that min_tokens "
            "holds back; allow more.",
            param="allowed_token_ids",
        )
    return token_mask(body.allowed_token_ids)


def _bad_words(vocabulary: Vocabulary, body: GenerationBody) -> tuple[tuple[int, ...], ...]:
    """Each word's tokens as the answer's first one and behind a blank, as vLLM bans them."""
    words: dict[tuple[int, ...], None] = {}
    for word in body.bad_words or ():
        bare, spaced = (
            tuple(vocabulary.tokenizer.encode(text, add_special_tokens=False))
            for text in (word.lstrip(), " " + word.lstrip())
        )
        words[bare] = None
        # Where the blank is a token of its own, the bare word's tokens follow it.
        if len(spaced) == len(bare):
            words[spaced] = None
    words.pop((), None)
    return tuple(words)


def _check_token(vocabulary: Vocabulary, token: int, field: str) -> None:
    if not 0 <= token < vocabulary.size:
        raise ApiError(
            400,
            f"{field} names token {shown(token)}; the token ids of this model go from 0 to "
            f"{vocabulary.size - 1}.",
            param=field,
        )
