"""Makes bodies of chat completions out of those of other APIs."""

from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from infuse.server.api.chat_schemas import ChatBody


def chat_body(fields: Mapping[str, Any]) -> ChatBody:
    """The body with these fields; None counts as unset. Raises RequestValidationError."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatBody.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None
