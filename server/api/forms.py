"""Reads the multipart form of an upload. FastAPI's own reading would pass unknown fields over."""

from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fastapi import Request
from pydantic import BaseModel
from starlette.datastructures import UploadFile

from infuse.adapters.errors import Fault, InvalidAdapter
from infuse.adapters.storage.folder import writing
from infuse.adapters.storage.names import NAME_PATTERN
from infuse.adapters.storage.store import UPLOADED
from infuse.server.errors import ApiError
from infuse.server.uploads import Take, save_files, unpack

_FILES = {"config", "weights", "archive"}
_FULL = "The disk that takes uploads in is full; make room."
_FAILS = "The disk that takes uploads in fails: {error}."


def upload_body(fields: dict[str, dict[str, str]], source: type[BaseModel]) -> dict[str, Any]:
    """The body of an upload in the OpenAPI document: a form, or JSON that names a source."""
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


class Form:
    """A multipart form with the files of an adapter: the two files, or an archive."""

    def __init__(self, files: Mapping[str, IO[bytes]], name: str | None) -> None:
        self._files = files
        self.name = name

    def save(self, folder: Path, limit: int, take: Take) -> str:
        """Write the adapter's files to a folder; returns where they come from. `limit`, `take` and
        errors: see `unpack`."""
        if "archive" in self._files:
            unpack(self._files["archive"], folder, limit, take)
        else:
            save_files(self._files["config"], self._files["weights"], folder, limit, take)
        return UPLOADED.source


async def read_form(request: Request, named: bool, take: Take, most: int) -> Form:
    """Read the form of an upload, in which a name may stand where `named`. Raises ApiError 400,
    InvalidAdapter, and what `take` raises.

    `take` is told how long the body is before it is read: `most` bytes where it does not say.
    """
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
    with writing(_FULL, _FAILS):
        form = await request.form(max_files=8, max_fields=8)
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
    return Form(files, name)
