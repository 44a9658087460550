"""Appends sampled tokens to a sequence, decodes their text, and finds whether they end it."""

from collections import abc

from infuse.server.engine.native.sampling.sampler import Sampled
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.request import FinishReason, Output


def take(
    sequence: Sequence, choices: abc.Sequence[Sampled], eos_token_ids: abc.Collection[int]
) -> Output:
    """Append a sequence's next tokens until one ends it, and return them as an output."""
    params = sequence.request.params
    scores = None
    is_first = sequence.answer_tokens == 0
    if params.prompt_logprobs is not None and is_first:
        scores = tuple(sequence.prompt_logprobs)
    taken: list[Sampled] = []
    text, error = "", ""
    reason = FinishReason.LENGTH if params.max_tokens == 0 else None
    for choice in choices:
        if not choice.finite:
            reason = FinishReason.ERROR
            error = "The model's output is not finite; check the adapter's values."
        elif choice.grammar_error:
            reason, error = FinishReason.CONSTRAINT, choice.grammar_error
        if reason is not None:
            break
        if taken:
            # The previous token was an accepted draft, whose keys and values are computed.
            sequence.advance(1)
        taken.append(choice)
        piece, reason = _append(sequence, choice.token, eos_token_ids)
        text += piece
    if reason is not None and not error:
        text += sequence.detokenizer.finish(sequence.may_stop)
    return Output(
        request_id=sequence.request.id,
        token_ids=tuple(choice.token for choice in taken),
        started=sequence.started if is_first else None,
        lacked_slot=sequence.lacked_slot if is_first else None,
        text=text,
        logprobs=tuple(choice.logprob for choice in taken if choice.logprob is not None),
        prompt_logprobs=scores,
        cached_tokens=0 if reason is None else sequence.cached_tokens or 0,
        finish_reason=reason,
        stop_reason=sequence.stop_reason if reason is FinishReason.STOP else None,
        error=error,
        predicted_tokens=0 if reason is None else sequence.predicted_tokens,
    )


def _append(
    sequence: Sequence, token: int, eos_token_ids: abc.Collection[int]
) -> tuple[str, FinishReason | None]:
    """Append one token. Returns its text, and the finish reason if it ends the answer."""
    params = sequence.request.params
    sequence.append(token)
    ignores_eos = params.ignore_eos and sequence.constraint is None
    is_end = token in eos_token_ids and not ignores_eos
    if is_end or token in params.stop_token_ids:
        shown = sequence.detokenizer.push(token, False)[0] if params.include_stop else ""
        return shown, FinishReason.STOP
    text, stopped = sequence.detokenizer.push(token, sequence.may_stop)
    sequence.see(text)
    if stopped:
        return text, FinishReason.STOP
    return text, FinishReason.LENGTH if sequence.answer_tokens >= params.max_tokens else None
