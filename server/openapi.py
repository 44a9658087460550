"""The OpenAPI document: each route names every status that it answers with, and no other.

A route says which errors it raises: `errors(404, 409)`. The statuses that follow from its shape are
added here: 401, 403, 429 and 503 where a key is needed; 400 where something is checked; 408 and 413
where a body is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from infuse.server.error_forms import FORMS, form_of
from infuse.server.errors import ErrorBody
from infuse.server.outside import Layer

Json = dict[str, Any]
_SCHEMAS = "#/components/schemas/"


def header(text: str, *, kind: str = "string", always: bool = True) -> Json:
    """A header of an answer. `always`: no answer of this status comes without it."""
    return {"description": text, "schema": {"type": kind}, "required": always}


ETAG = {"ETag": header("Of the adapter's current revision.")}
_RETRY_AFTER = {"Retry-After": header("Seconds after which to come back.", kind="integer")}
_ERRORS: dict[int, Json] = {
    400: {"description": "What was sent has faults, all of them listed."},
    401: {
        "description": "No valid API key or token was given.",
        "headers": {"WWW-Authenticate": header("`Bearer`, and what is wrong with a token.")},
    },
    403: {"description": "The key lacks the role that this needs, or its scope forbids it."},
    404: {"description": "There is nothing of this name."},
    408: {"description": "The body did not come in time."},
    409: {"description": "What there is already stands in the way; the message says what."},
    412: {"description": "The adapter has changed since.", "headers": ETAG},
    413: {"description": "The body is larger than this server takes."},
    416: {
        "description": "The file has not so many bytes.",
        "headers": {"Content-Range": header("How many it has: `bytes */2816`.")},
    },
    429: {
        "description": "Too many wait already, or the key has used its share.",
        "headers": _RETRY_AFTER,
    },
    500: {"description": "The server failed, or what it has stored is damaged."},
    502: {"description": "The source failed."},
    503: {"description": "Not now: the server, or its storage.", "headers": _RETRY_AFTER},
    504: {"description": "The source, or the request, took too long."},
    507: {"description": "The disk or the bucket is full."},
}
CHANGES = (503, 507)
"""The further statuses of a route that writes to the store of adapters."""
READS = (500, 503, 507)
"""The further statuses of a route that reads an adapter's files: they are damaged, or in a bucket
that does not answer, or find no room on this machine."""


def errors(*statuses: int, said: Mapping[int, str] | None = None) -> dict[int | str, Json]:
    """A route's answers beside success, for its `responses`.

    `said`: further statuses, with what they mean there where that is more than elsewhere.
    """
    texts = {status: {"description": text} for status, text in (said or {}).items()}
    return {
        status: {"model": ErrorBody} | _ERRORS[status] | texts.get(status, {})
        for status in (*statuses, *texts)
    }


class Application(FastAPI):
    """FastAPI with a complete OpenAPI document, and layers before all of its middleware."""

    outside: Sequence[Layer] = ()
    """The innermost first. They see each answer; one that no middleware sees is that for what
    nobody has foreseen."""

    def build_middleware_stack(self) -> ASGIApp:
        app = super().build_middleware_stack()
        for layer in self.outside:
            app = layer(app)
        return app

    def openapi(self) -> Json:
        if self.openapi_schema is None:
            document = super().openapi()
            for path, operations in document["paths"].items():
                form = form_of(path)
                for operation in operations.values():
                    _complete(operation, ErrorBody if form is None else form.model)
            schemas = document["components"]["schemas"]
            for of_fastapi in ("HTTPValidationError", "ValidationError"):
                schemas.pop(of_fastapi, None)
            schemas |= _schemas([form.model for form in FORMS])
        return super().openapi()


def _schemas(models: Sequence[type[BaseModel]]) -> Json:
    """The schemas of models, and of those inside of them, by their names."""
    written: Literal["serialization"] = "serialization"
    of_each = [(model, written) for model in models]
    _, together = models_json_schema(of_each, ref_template=f"{_SCHEMAS}{{model}}")
    return dict(together["$defs"])


def _complete(operation: Json, error: type[BaseModel]) -> None:
    """`error`: what the operation's errors look like."""
    responses = operation["responses"]
    # FastAPI adds a 422 wherever there is a parameter; here a 400 stands where one is checked.
    responses.pop("422", None)
    for status in _derived(operation):
        responses.setdefault(str(status), dict(_ERRORS[status]))
    schema = {"$ref": f"{_SCHEMAS}{error.__name__}"}
    for status, answer in responses.items():
        if int(status) >= 400:
            answer["content"] = {"application/json": {"schema": schema}}
    operation["responses"] = dict(sorted(responses.items()))


def _derived(operation: Json) -> Iterator[int]:
    if "security" in operation:
        yield from (401, 403, 429, 503)
    has_body = "requestBody" in operation
    if has_body:
        yield from (408, 413)
    if has_body or any(_is_checked(each["schema"]) for each in operation.get("parameters", ())):
        yield 400


def _is_checked(schema: Json) -> bool:
    """Whether a parameter can be wrong. One that takes any text cannot."""
    return not any(
        each["type"] == "string" and each.keys() <= _OF_ANY_TEXT
        for each in schema.get("anyOf", [schema])
    )


_OF_ANY_TEXT = {"type", "title", "description", "examples"}
