"""Joins the outputs of an answer, and tells why it ended or failed."""

from collections.abc import Sequence

from infuse.server.api.answer_schemas import FinishedBecause, StopReason
from infuse.server.api.schemas import GenerationBody
from infuse.server.engine.errors import EngineDead
from infuse.server.engine.request import FinishReason, Output
from infuse.server.errors import RETRY_SOON, ApiError, from_engine_error


def join(outputs: Sequence[Output]) -> Output:
    """The outputs of one answer as one output."""
    return Output(
        request_id=outputs[-1].request_id,
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(scored for output in outputs for scored in output.logprobs),
        prompt_logprobs=outputs[0].prompt_logprobs,
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
    )


def finished_because(output: Output) -> FinishedBecause | None:
    match output.finish_reason:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case _:
            return None


def stopped_by(body: GenerationBody, output: Output) -> StopReason:
    """The stop string or stop token of the request that ended an answer; None for an end token,
    which may be an adapter's own."""
    reason = output.stop_reason
    return reason if isinstance(reason, str) or reason in (body.stop_token_ids or ()) else None


def raise_if_failed(output: Output) -> None:
    """Raises ApiError where the answer ended in any other way than a stop or its length."""
    if output.finish_reason is FinishReason.ENGINE_DEAD:
        raise from_engine_error(EngineDead())
    if output.finish_reason is FinishReason.ERROR:
        raise ApiError(500, output.error or "The engine failed; the server's log says why.")
    if output.finish_reason is FinishReason.CONSTRAINT:
        raise ApiError(
            400,
            f"The constraint {output.error}; simplify it.",
            code="invalid_constraint",
        )
    if output.finish_reason is FinishReason.CANCELLED:
        raise ApiError(
            503,
            "The server is shutting down and could not finish this answer; send it again.",
            code="stopping",
            headers=RETRY_SOON,
        )
