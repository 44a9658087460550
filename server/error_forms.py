"""The forms in which the APIs of others write errors. Everywhere else errors have OpenAI's."""

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infuse.server import request_id

Info = Mapping[str, Any]
"""An error in OpenAI's form: what stands in its `error`."""

_ANTHROPICS_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicErrorInfo(BaseModel):
    type: str = Field(description="Anthropic's class of error.", examples=["invalid_request_error"])
    message: str = Field(
        description="For people; names all faults.", examples=["There is no model 'x'."]
    )


class AnthropicErrorBody(BaseModel):
    """What every error of Anthropic's API looks like."""

    model_config = ConfigDict(title="AnthropicError")

    type: Literal["error"] = Field(description="Always `error`.", examples=["error"])
    error: AnthropicErrorInfo = Field(
        description="The error.",
        examples=[{"type": "not_found_error", "message": "There is no model 'x'."}],
    )
    request_id: str | None = Field(
        description="The request's `X-Request-Id`.", examples=["7f3a9c51e2"]
    )


class OllamaErrorBody(BaseModel):
    """What every error of Ollama's API looks like."""

    model_config = ConfigDict(title="OllamaError")

    error: str = Field(
        description="For people; names all faults.", examples=["There is no model 'x'."]
    )


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """How an API writes an error."""

    model: type[BaseModel]
    write: Callable[[int, Info], dict[str, Any]]
    """The body of an error, from its status and OpenAI's form."""


def _anthropics(status: int, info: Info) -> dict[str, Any]:
    otherwise = "invalid_request_error" if status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": _ANTHROPICS_TYPES.get(status, otherwise), "message": _message(info)},
        "request_id": request_id.current.get(),
    }


def _ollamas(_: int, info: Info) -> dict[str, Any]:
    return {"error": _message(info)}


def _message(info: Info) -> str:
    """The message, with every fault where there are several."""
    faults = info["details"]
    if len(faults) < 2:
        return str(info["message"])
    return "; ".join(
        f"{fault['field']}: {fault['problem']}" + (f" ({fault['fix']})" if fault["fix"] else "")
        for fault in faults
    )


_ANTHROPICS = ErrorForm(AnthropicErrorBody, _anthropics)
_OLLAMAS = ErrorForm(OllamaErrorBody, _ollamas)
FORMS = (_ANTHROPICS, _OLLAMAS)
current: ContextVar[ErrorForm | None] = ContextVar("error_form", default=None)
"""The form of the current request's errors. None: OpenAI's."""


def form_of(path: str) -> ErrorForm | None:
    """The form of the errors of what is at a path. None: OpenAI's."""
    if f"{path}/".startswith("/v1/messages/"):
        return _ANTHROPICS
    return _OLLAMAS if path.startswith("/api/") else None
