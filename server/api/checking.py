"""Refuses a generation request that its body alone shows cannot be served."""

from infuse.server.api.foreign_fields import refuse_foreign
from infuse.server.api.model_schemas import ModelBody
from infuse.server.errors import ApiError


def check_body(body: ModelBody, prompts: int, max_queue: int) -> None:
    """Refuse fields that ask for something this server does not do, and more choices than the queue
    holds: they could never be admitted together. Raises ApiError 400."""
    refuse_foreign(body.model_extra or {})
    wanted = prompts * body.choices_per_prompt
    if wanted > max_queue:
        raise ApiError(
            400,
            f"{prompts} prompts with n = {body.choices_per_prompt} are {wanted} choices; this "
            f"server takes at most {max_queue} in one request. Send several.",
            param="n" if prompts == 1 else "prompt",
        )
