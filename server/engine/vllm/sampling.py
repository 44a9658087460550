"""Turns a request's sampling parameters into vLLM's."""

import json
from collections.abc import Collection
from typing import Any

from vllm.sampling_params import (
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

from infuse.server.engine.constraints.grammars import Grammar
from infuse.server.engine.constraints.vetting import JSON_OPTIONS, supported_schema
from infuse.server.engine.request import SamplingParams as OurParams
from infuse.server.engine.vllm.config import SLOT


def vllm_params(params: OurParams, slot: int, ends: Collection[int]) -> SamplingParams:
    """`ends`: the tokens that end the answer. The engine decodes the text and finds stop strings
    itself, so vLLM sees tokens only."""
    allowed = params.allowed_tokens
    is_greedy = params.temperature == 0
    made = SamplingParams(
        max_tokens=max(1, params.max_tokens),
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=0 if is_greedy else params.top_k,
        top_p=1.0 if is_greedy else params.top_p,
        min_p=0.0 if is_greedy else params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        seed=params.seed,
        # All tokens that end the answer are named.
        ignore_eos=True,
        stop_token_ids=sorted(ends),
        allowed_token_ids=None if allowed is None else [i for i, yes in enumerate(allowed) if yes],
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        structured_outputs=_structured(params.grammar) if params.grammar_begin is None else None,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args={SLOT: slot} if slot else None,
        skip_clone=True,
    )
    if params.bad_words:
        # vLLM would make tokens of texts; the API has made them already.
        made._bad_words_token_ids = [list(word) for word in params.bad_words]
    return made


def _structured(grammar: Grammar | None) -> StructuredOutputsParams | None:
    if grammar is None:
        return None
    source: Any = grammar.source
    if grammar.kind == "json":
        schema = supported_schema(json.loads(grammar.source))
        own = {"x-guidance": JSON_OPTIONS}
        source = json.dumps(schema | own if isinstance(schema, dict) else schema)
    elif grammar.kind == "choice":
        source = json.loads(grammar.source)
    return StructuredOutputsParams(**{grammar.kind: source})
