"""The multipart form of an upload, read by hand: unknown fields are refused, and large parts go to
disk."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from adapters.errors import Fault, InvalidAdapter, StoreFull
from adapters.storage.folder import NO_ROOM
from adapters.storage.names import NAME_PATTERN
from adapters.storage.store import UPLOADED
from server.api.uploads import Take, save_files, unpack
from server.errors import ApiError
from server.services import Services

T = TypeVar("T")

_FILES = {"config", "weights", "archive"}


def form(fields: dict[str, dict[str, str]], source: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of an upload, or of where to fetch it."""
    binary = {"type": "string", "format": "binary"}
    properties = {
        **fields,
        "config": {**binary, "description": "adapter_config.json", "example": "@config"},
        "weights": {**binary, "description": "adapter_model.safetensors", "example": "@weights"},
        "archive": {**binary, "description": "Or a zip or tar of all.", "example": "@archive"},
    }
    schema = {"type": "object", "properties": properties, "required": list(fields)}
    content = {
        "multipart/form-data": {"schema": schema},
        "application/json": {"schema": source.model_json_schema()},
    }
    return {"requestBody": {"required": True, "content": content}}


NAME_FIELD = {
    "name": {
        "type": "string",
        "pattern": f"^{NAME_PATTERN}$",
        "description": "The new adapter's name.",
        "example": "support-de",
    }
}


class Upload:
    """A parsed multipart form."""

    def __init__(self, files: Mapping[str, IO[bytes]], name: str | None) -> None:
        self.files = files
        self.name = name

    async def stage(self, services: Services, take: Take, then: Callable[[Path, str], T]) -> T:
        """Write the files to a staging folder, and go on with it and with where they come from,
        in a worker thread."""
        return await to_thread.run_sync(self._stage, services, take, then, limiter=services.staging)

    def _stage(self, services: Services, take: Take, then: Callable[[Path, str], T]) -> T:
        limit = services.settings.max_upload_bytes
        with services.store.staging() as folder:
            if "archive" in self.files:
                unpack(self.files["archive"], folder, limit, take)
            else:
                save_files(self.files["config"], self.files["weights"], folder, limit, take)
            return then(folder, UPLOADED.source)


async def read_upload(request: Request, named: bool, take: Take, most: int) -> Upload:
    """`take` is told how long the body is before it is read: `most` bytes where it does not say."""
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ApiError(
            400,
            "An adapter comes as multipart/form-data (config and weights, or archive), or as "
            "application/json (source).",
            code="not_multipart",
            param="body",
        )
    length = request.headers.get("content-length", "")
    take(int(length) if length.isdigit() else most)
    try:
        form = await request.form(max_files=8, max_fields=8)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StoreFull("The disk that takes uploads in is full; make room.") from error
    faults, files, name = [], {}, None
    for field, value in form.multi_items():
        if field in files or (field == "name" and name is not None):
            faults.append(Fault(field, "is given more than once", "send it once"))
        elif field == "name" and named and isinstance(value, str):
            name = value
        elif field in _FILES and isinstance(value, UploadFile):
            files[field] = value.file
        elif field in _FILES:
            faults.append(Fault(field, "is text, not a file", "send it as a file part"))
        else:
            faults.append(Fault(field, "is no field of this form", "leave it out"))
    if files.keys() not in ({"archive"}, {"config", "weights"}) and not faults:
        fix = "send both config and weights, or archive alone"
        faults.append(Fault("files", f"cannot work with {sorted(files) or 'no files'}", fix))
    if faults:
        raise InvalidAdapter(faults)
    return Upload(files, name)
