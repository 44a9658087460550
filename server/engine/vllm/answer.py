"""The answer of one request: its place in the queue, and its outputs out of vLLM's tokens."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from infuse.server.engine.detokenizer import Detokenizer
from infuse.server.engine.fair_queue import HEADROOM
from infuse.server.engine.request import (
    FinishReason,
    GenerationRequest,
    InFlight,
    Output,
    TokenLogprob,
    WaitsFor,
)


class Answer:
    """A request from its arrival to its last output."""

    has_started = False
    """Whether it has left the queue; it never comes back."""
    rank = 0

    def __init__(
        self,
        request: GenerationRequest,
        seq_id: int,
        tokenizer: PreTrainedTokenizerFast,
        end_tokens: frozenset[int],
    ) -> None:
        params = request.params
        self.request = request
        self.seq_id = seq_id
        ignores_ends = params.ignore_eos and params.grammar is None
        self.ends = params.stop_token_ids | (frozenset() if ignores_ends else end_tokens)
        """The tokens that end it."""
        self._detokenizer = Detokenizer(
            tokenizer,
            request.prompt,
            params.stop,
            params.skip_special_tokens,
            params.include_stop,
        )
        self._tokens = 0
        self._cached = 0
        self._has_begun = False
        self._started: float | None = None
        self._lacked_slot: float | None = None
        self._first_token: float | None = None

    @property
    def has_tokens(self) -> bool:
        return self._tokens > 0

    @property
    def used_tokens(self) -> int:
        return len(self.request.prompt) - self._cached + self._tokens

    @property
    def charge(self) -> int:
        reserved = min(self.request.params.max_tokens, HEADROOM)
        return self.used_tokens - self._tokens + max(self._tokens, reserved)

    def start(self) -> None:
        """Note that it is given to vLLM now."""
        self._started = time.perf_counter()

    def lack_slot(self) -> None:
        """Note that it is its turn, and no slot is free for its adapter."""
        if self._lacked_slot is None:
            self._lacked_slot = time.perf_counter()

    def in_flight(self, waits_for: WaitsFor | None) -> InFlight:
        """How far it is. `waits_for`: in our queue or in vLLM's; None: it runs. Any thread may call
        this."""
        return InFlight(
            request=self.request,
            is_running=waits_for is None,
            waits_for=waits_for or WaitsFor.TURN,
            answer_tokens=self._tokens,
            started=self._started if waits_for is None else None,
            first_token=self._first_token,
        )

    def take(self, result: Any) -> Output:
        """Return the output for vLLM's next `RequestOutput`. One with a finish reason is the last,
        though vLLM may not have ended the request."""
        params = self.request.params
        [step] = result.outputs
        self._cached = result.num_cached_tokens or 0
        is_first = self._first_token is None
        self._first_token = self._first_token or time.perf_counter()
        taken: list[int] = []
        text, stop, reason = "", None, None
        for token in step.token_ids if params.max_tokens else ():
            taken.append(token)
            piece, stop, reason = self._append(token)
            text += piece
            if reason is not None:
                break
        if reason is None and step.finish_reason is not None:
            ended_well = step.finish_reason in ("stop", "length")
            reason = FinishReason.LENGTH if ended_well else FinishReason.ERROR
        if reason is not None:
            text += self._detokenizer.finish(self._may_stop)
        return Output(
            request_id=self.request.id,
            token_ids=tuple(taken),
            started=self._started if is_first else None,
            lacked_slot=self._lacked_slot if is_first else None,
            text=text,
            logprobs=_scores(taken, step.logprobs, params.logprobs),
            prompt_logprobs=self._prompt_scores(result.prompt_logprobs),
            cached_tokens=0 if reason is None else self._cached,
            finish_reason=reason,
            stop_reason=stop,
            error=f"vLLM ended the request: {step.finish_reason}."
            if reason is FinishReason.ERROR
            else "",
        )

    def end(self, reason: FinishReason, error: str = "") -> Output:
        """The last output where vLLM has none."""
        is_first = self._first_token is None
        return Output(
            request_id=self.request.id,
            started=self._started if is_first else None,
            lacked_slot=self._lacked_slot if is_first else None,
            finish_reason=reason,
            error=error,
        )

    def _append(self, token: int) -> tuple[str, str | int | None, FinishReason | None]:
        """Append a token. Returns its text; and what stopped the answer and why, if it ends."""
        params = self.request.params
        self._tokens += 1
        if token in self.ends:
            shown = self._detokenizer.push(token, False)[0] if params.include_stop else ""
            stop = token if token in params.stop_token_ids else None
            return shown, stop, FinishReason.STOP
        text, stopped = self._detokenizer.push(token, self._may_stop)
        if stopped:
            return text, self._detokenizer.stopped_by, FinishReason.STOP
        is_last = self._tokens >= params.max_tokens
        return text, None, FinishReason.LENGTH if is_last else None

    @property
    def _may_stop(self) -> bool:
        """Whether `min_tokens` allows a stop string in the text of the latest token."""
        return self._tokens > self.request.params.min_tokens

    def _prompt_scores(
        self, scores: Sequence[Mapping[int, Any] | None] | None
    ) -> tuple[TokenLogprob | None, ...] | None:
        """The scores of the prompt, on the first output."""
        params = self.request.params
        if params.prompt_logprobs is None or self._has_begun or scores is None:
            return None
        self._has_begun = True
        known = zip(self.request.prompt, scores, strict=True)
        return tuple(
            None
            if position is None or place < params.prompt_logprobs_from
            else _score(token, position, params.prompt_logprobs)
            for place, (token, position) in enumerate(known)
        )


def _scores(
    tokens: Sequence[int], scores: Sequence[Mapping[int, Any]] | None, best: int | None
) -> tuple[TokenLogprob, ...]:
    if best is None or scores is None:
        return ()
    # A step may bring tokens after the one that ended the answer.
    return tuple(_score(token, scores[place], best) for place, token in enumerate(tokens))


def _score(token: int, position: Mapping[int, Any], best: int) -> TokenLogprob:
    ranked = sorted((each.rank, token_id, each.logprob) for token_id, each in position.items())
    top = tuple((token_id, logprob) for rank, token_id, logprob in ranked[:best] if rank <= best)
    return TokenLogprob(token, position[token].logprob, top)
