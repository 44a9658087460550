"""An upload that names where the adapter was published; the server fetches it from there."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from anyio import to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from server.api.adapter_schemas import NamedSourceBody, SourceBody
from server.api.uploads import Take
from server.services import Services

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Published:
    source: str
    name: str | None

    async def stage(self, services: Services, take: Take, then: Callable[[Path, str], T]) -> T:
        """Fetch the files into a staging folder, and go on with it and with where they come from,
        in a worker thread."""
        with services.store.staging() as folder:
            source = await services.sources.fetch(self.source, folder, take)
            return await to_thread.run_sync(then, folder, source, limiter=services.staging)


async def read_published(request: Request, named: bool) -> Published:
    """Raises RequestValidationError."""
    try:
        if named:
            body = NamedSourceBody.model_validate_json(await request.body())
            return Published(body.source, body.name)
        return Published(SourceBody.model_validate_json(await request.body()).source, None)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from None
