"""Reads an upload that names where the adapter was published."""

from dataclasses import dataclass

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from infuse.server.api.adapter_schemas import NamedSourceBody, SourceBody


@dataclass(frozen=True, slots=True)
class Published:
    """An adapter to fetch from where it was published."""

    source: str
    name: str | None


async def read_published(request: Request, named: bool) -> Published:
    """Read the JSON body of an upload, with the adapter's name where `named`. Raises
    RequestValidationError."""
    try:
        if named:
            body = NamedSourceBody.model_validate_json(await request.body())
            return Published(body.source, body.name)
        return Published(SourceBody.model_validate_json(await request.body()).source, None)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None
