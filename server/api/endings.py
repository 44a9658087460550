"""A whole answer of its parts, and why it ended."""

from collections.abc import Sequence

from server.api.answer_schemas import FinishedBecause, StopReason
from server.api.schemas import GenerationBody
from server.engine.request import FinishReason, Output


def join(outputs: Sequence[Output]) -> Output:
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
