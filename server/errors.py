"""Maps errors to HTTP: the one place where our error trees become statuses, in OpenAI's shape."""

import errno
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Scope

from infuse.adapters.errors import (
    AdapterDisabled,
    AdapterError,
    AdapterExists,
    BadSource,
    CannotCombine,
    CannotMerge,
    CombinedNotFinite,
    Fault,
    InvalidAdapter,
    MergeNotDone,
    NotSigned,
    QuotaExceeded,
    RevisionConflict,
    RevisionDamaged,
    SandboxUnavailable,
    SignersUnreadable,
    SourceError,
    SourceFailed,
    SourceNotAllowed,
    SourceNotFound,
    SourceRefused,
    SourceTimeout,
    SourceTooLarge,
    StoreDamaged,
    StoreFull,
    StoreLocked,
    StoreUnreachable,
    TemplateRefused,
    TooManyMerges,
    TooManyPinned,
    UnknownAdapter,
    UnknownMerge,
    UnknownRevision,
)
from infuse.server import error_forms, request_id
from infuse.server.engine.errors import (
    BadConstraint,
    ConstraintsUnavailable,
    EngineDead,
    EngineError,
    EngineStopping,
    QueueFull,
    WaitTooLong,
)
from infuse.server.headers import SAFE

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""nginx's status for a client that closed its connection before the answer; only logs show it."""
RETRY_SOON = {"Retry-After": "5"}
"""The headers of errors that pass within seconds, as another replica answers or other requests end;
nobody knows how many seconds."""
_NO_THREAD = "can't start new thread"
"""What Python says where there is no memory for a thread's stack."""
_LACKING = {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
"""What the system says where it gives no memory, no open file and no process."""
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SOURCE_ERRORS: dict[type[SourceError], tuple[int, str]] = {
    BadSource: (400, "invalid_source"),
    SourceNotAllowed: (403, "source_not_allowed"),
    SourceNotFound: (400, "source_not_found"),
    SourceRefused: (400, "source_refused"),
    SourceTooLarge: (413, "upload_too_large"),
    SourceFailed: (502, "source_failed"),
    SourceTimeout: (504, "source_timeout"),
}
"""The status and code of each error: 400 where another URL, or other credentials of the server,
would help."""


class ErrorDetail(BaseModel):
    field: str = Field(description="What is wrong.", examples=["target_modules"])
    problem: str = Field(
        description="How it is wrong.", examples=["matches no module of the base model"]
    )
    fix: str = Field(description="What to do about it.", examples=["name linear layers only"])


class ErrorInfo(BaseModel):
    message: str = Field(description="For people.", examples=["There is no adapter named 'x'."])
    type: str = Field(description="OpenAI's class of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="The field that is to blame.", examples=["model"])
    code: str | None = Field(description="For programs.", examples=["model_not_found"])
    details: list[ErrorDetail] = Field(
        description="All faults, where there are several.",
        examples=[[{"field": "weights", "problem": "is missing", "fix": "upload both files"}]],
    )


class ErrorBody(BaseModel):
    """What every error looks like."""

    model_config = ConfigDict(title="Error")

    error: ErrorInfo = Field(
        description="The error.",
        examples=[
            {
                "message": "There is no adapter named 'x'.",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
                "details": [],
            }
        ],
    )


class ApiError(Exception):
    """An error as it is answered over HTTP. `details` lists every fault, not the first alone."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        details: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.details = tuple(details)
        self.headers = dict(headers or {})


def error_body(error: ApiError) -> str:
    """The JSON text of an error."""
    return json.dumps(error_json(error))


def error_json(error: ApiError) -> dict[str, Any]:
    """An error in the form of the current request's API."""
    info = {
        "message": error.message,
        "type": _type(error.status),
        "param": error.param,
        "code": error.code,
        "details": [
            {"field": fault.field, "problem": fault.problem, "fix": fault.fix}
            for fault in error.details
        ],
    }
    form = error_forms.current.get()
    return {"error": info} if form is None else form.write(error.status, info)


def error_response(error: ApiError) -> Response:
    return Response(error_body(error), error.status, error.headers, media_type="application/json")


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(AdapterError, _adapter_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_left)
    app.add_exception_handler(Exception, _unforeseen)


def _type(status: int) -> str:
    known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _adapter_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterError)
    return error_response(from_adapter_error(error))


def from_adapter_error(error: AdapterError) -> ApiError:
    match error:
        case InvalidAdapter(faults=faults):
            many = f"The adapter has {len(faults)} faults; see details."
            message = str(faults[0]) if len(faults) == 1 else many
            return ApiError(
                400, message, code="invalid_adapter", param=faults[0].field, details=faults
            )
        case UnknownAdapter() | UnknownRevision():
            return ApiError(404, str(error), code="adapter_not_found", param="name")
        case AdapterExists():
            return ApiError(409, str(error), code="adapter_exists", param="name")
        case RevisionConflict(current=current):
            headers = {"ETag": current}
            return ApiError(
                412, str(error), code="revision_conflict", param="If-Match", headers=headers
            )
        case RevisionDamaged():
            return ApiError(500, str(error), code="adapter_damaged", param="model")
        case AdapterDisabled():
            return ApiError(403, str(error), code="adapter_disabled", param="model")
        case TooManyPinned():
            return ApiError(409, str(error), code="too_many_pinned", param="pinned")
        case CannotCombine():
            return ApiError(400, str(error), code="cannot_combine", param="adapters")
        case CombinedNotFinite():
            return ApiError(400, str(error), code="not_finite", param="adapters")
        case CannotMerge():
            return ApiError(409, str(error), code="cannot_merge")
        case UnknownMerge():
            return ApiError(404, str(error), code="merge_not_found", param="id")
        case MergeNotDone():
            return ApiError(409, str(error), code="merge_not_done", param="id")
        case TooManyMerges(retry_after=seconds):
            headers = {"Retry-After": str(seconds)}
            return ApiError(429, str(error), code="too_many_merges", headers=headers)
        case QuotaExceeded():
            return ApiError(403, str(error), code="quota_exceeded")
        case NotSigned():
            return ApiError(403, str(error), code="not_signed")
        case SignersUnreadable():
            return ApiError(503, str(error), code="signers_unreadable", headers=RETRY_SOON)
        case SourceError():
            status, code = SOURCE_ERRORS[type(error)]
            return ApiError(status, str(error), code=code, param="source")
        case StoreFull():
            return ApiError(507, str(error), code="storage_full")
        case TemplateRefused():
            return ApiError(
                400,
                f"The model's chat template does not take this conversation: {error}",
                param="messages",
            )
        case SandboxUnavailable():
            return ApiError(503, str(error), code="sandbox_unavailable", headers=RETRY_SOON)
        case StoreUnreachable() | StoreLocked():
            return ApiError(503, str(error), code="storage_unavailable", headers=RETRY_SOON)
        case StoreDamaged():
            return ApiError(500, str(error), code="storage_damaged")
        case _:
            log.error("An adapter error without a status of its own: %r", error)
            return ApiError(500, str(error))


async def _engine_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, EngineError)
    return error_response(from_engine_error(error))


def from_engine_error(error: EngineError) -> ApiError:
    match error:
        case QueueFull(retry_after=seconds):
            headers = {"Retry-After": str(seconds)}
            return ApiError(429, str(error), code="queue_full", headers=headers)
        case WaitTooLong(retry_after=seconds):
            headers = {"Retry-After": str(seconds)}
            return ApiError(429, str(error), code="wait_too_long", headers=headers)
        case BadConstraint(where=where):
            return ApiError(400, str(error), code="invalid_constraint", param=where)
        case ConstraintsUnavailable():
            return ApiError(400, str(error), code="constraints_unavailable")
        case EngineStopping():
            return ApiError(503, str(error), code="stopping", headers=RETRY_SOON)
        case EngineDead():
            return ApiError(503, str(error), code="engine_dead", headers=RETRY_SOON)
        case _:
            log.error("An engine error without a status of its own: %r", error)
            return ApiError(500, str(error))


async def _validation_error(request: Request, error: Exception) -> Response:
    """Answer a malformed request with 400, as OpenAI's API does; FastAPI's own answer is a 422."""
    assert isinstance(error, RequestValidationError)
    faults = [_fault(each) for each in error.errors()]
    if isinstance(error.body, bytes) and error.body:
        # It has not been read as JSON.
        given = request.headers.get("content-type")
        problem = "is missing" if given is None else f"is {given[:80]!r}"
        faults = [Fault("Content-Type", problem, "send JSON, as application/json")]
    first = faults[0]
    message = f"{first.field}: {first.problem}" + (f"; {first.fix}" if first.fix else "")
    api_error = ApiError(400, message, code="invalid_request", param=first.field, details=faults)
    return error_response(api_error)


def _fault(error: Mapping[str, Any]) -> Fault:
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "")
        return Fault("body", f"is no valid JSON: {reason}", "send a JSON object")
    where = [str(part) for part in error["loc"] if part not in ("body", "query", "path", "header")]
    fix = "leave it out" if error["type"] == "extra_forbidden" else ""
    # What a validator of ours says stands alone, without pydantic's class of error before it.
    return Fault(".".join(where) or "body", error["msg"].removeprefix("Value error, "), fix)


def nothing_at(method: str, path: str) -> ApiError:
    return ApiError(404, f"There is nothing at {method} {path}; /docs lists what is.")


async def _client_left(_: Request, error: Exception) -> Response:
    """The client left within its body. Nobody reads the answer."""
    assert isinstance(error, ClientDisconnect)
    return error_response(ApiError(CLIENT_GONE, "The client has left."))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _client_left(request, error.__cause__)
    messages = {
        404: nothing_at(request.method, request.url.path).message,
        405: f"{request.method} is not allowed at {request.url.path}; /docs lists what is.",
    }
    message = messages.get(error.status_code, str(error.detail))
    codes = {400: "invalid_request", 408: "request_timeout", 413: "body_too_large"}
    code = codes.get(error.status_code)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed(request))
    param = None
    if isinstance(error.__cause__, UnicodeDecodeError):
        packed = error.__cause__.object.startswith(b"\x1f\x8b")
        is_what = "is gzip" if packed else "is not UTF-8"
        message = f"The body {is_what}; a packed body comes with the header Content-Encoding: gzip."
        param = "Content-Encoding" if packed else "body"
    return error_response(
        ApiError(error.status_code, message, code=code, param=param, headers=headers)
    )


def _allowed(request: Request) -> list[str]:
    """The methods of all routes that a path has; Starlette names those of the first alone. What
    answers GET answers HEAD."""
    routed = {
        method
        for method in _METHODS
        for route in request.app.routes
        if route.matches(_bare_scope(request, method))[0] is Match.FULL
    }
    return [each for each in _METHODS if each in routed or (each == "HEAD" and "GET" in routed)]


def _bare_scope(request: Request, method: str) -> Scope:
    """The scope as it was before routing, which adds to the request's own."""
    known = ("type", "path", "root_path", "headers", "app")
    return {name: request.scope[name] for name in known} | {"method": method}


async def _unforeseen(request: Request, error: Exception) -> Response:
    log.error("%s %s failed.", request.method, request.url.path, exc_info=error)
    answer = error_response(_unforeseen_error(error))
    # Starlette sends this outside of all middleware.
    answer.headers.update(SAFE)
    # Starlette raises the error again, and uvicorn closes the connection then.
    answer.headers["Connection"] = "close"
    if (id_ := request_id.current.get()) is not None:
        answer.headers[request_id.HEADER] = id_
    return answer


def _unforeseen_error(error: Exception) -> ApiError:
    lacks = isinstance(error, OSError) and error.errno in _LACKING
    if lacks or isinstance(error, MemoryError) or _NO_THREAD in str(error):
        message = (
            "The server has no memory, open files or processes left for this now: send it again "
            "later."
        )
        return ApiError(503, message, code="no_memory", headers=RETRY_SOON)
    return ApiError(500, "The server failed; its log says why.")
