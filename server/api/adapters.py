"""The admin API: adapters come, change and go while requests run."""

from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path as FilePath
from typing import IO, Annotated, Any, Literal, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse

from adapters.errors import Fault, InvalidAdapter, StoreFull
from adapters.store import NAME_PATTERN, NO_ROOM, Revision
from server.api.uploads import save_files, unpack
from server.errors import ApiError, ErrorBody
from server.services import Services, get_services

T = TypeVar("T")

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

ServicesDep = Annotated[Services, Depends(get_services)]
Name = Annotated[
    str, Path(description="The adapter's name.", examples=["support-de"], max_length=128)
]
IfMatch = Annotated[
    str | None,
    Header(
        description="Only if this is still the adapter's ETag.", examples=['"9f86d081884c7d65"']
    ),
]
DryRun = Annotated[bool, Query(description="Check the upload and keep nothing.", examples=[True])]
_FILES = {"config", "weights", "archive"}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "What was sent has faults; all of them are listed.",
        404: "There is no such adapter.",
        409: "The name is taken.",
        412: "The adapter has changed since.",
        413: "The upload is too large.",
        507: "The disk is full.",
    }.items()
}


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: _ERRORS[status] for status in statuses}


class Adapter(BaseModel):
    object: Literal["adapter"] = Field("adapter", description="Kind.", examples=["adapter"])
    name: str = Field(description="What requests name as their model.", examples=["support-de"])
    revision: int = Field(description="Counts the contents of this name.", examples=[3])
    digest: str = Field(description="SHA-256 of its files.", examples=["9f86d081884c7d65..."])
    size: int = Field(description="Bytes of its files.", examples=[230912])
    created: datetime = Field(
        description="When this revision was made.", examples=["2026-11-23T20:00:00Z"]
    )
    source: str = Field(description="Where it came from.", examples=["upload"])
    parent: str = Field(description="The base model.", examples=["smollm2-135m-instruct"])
    warnings: list[str] = Field(
        default=[], description="Not wrong, but worth a look; only after an upload.", examples=[[]]
    )
    unchanged: bool = Field(
        default=False,
        description="After PUT: the content was the same already, and nothing was done.",
        examples=[False],
    )


class AdapterList(BaseModel):
    object: Literal["list"] = Field("list", description="Kind.", examples=["list"])
    data: list[Adapter] = Field(description="In order of names.", examples=[[]])
    next: str | None = Field(
        description="Give this as `after` for the next page.", examples=["support-de"]
    )


class CheckedUpload(BaseModel):
    """A dry run found no fault."""

    object: Literal["adapter.check"] = Field(
        "adapter.check", description="Kind.", examples=["adapter.check"]
    )
    targets: int = Field(description="How many modules it rescales.", examples=[90])
    nbytes: int = Field(description="Bytes of its vectors in memory.", examples=[230400])
    warnings: list[str] = Field(description="Not wrong, but worth a look.", examples=[[]])


def _form(fields: dict[str, dict[str, str]]) -> dict[str, Any]:
    """OpenAPI's description of an upload. The form is read by hand, so that unknown fields are
    refused and large parts go to disk."""
    binary = {"type": "string", "format": "binary"}
    properties = {
        **fields,
        "config": {**binary, "description": "adapter_config.json", "example": "@config"},
        "weights": {**binary, "description": "adapter_model.safetensors", "example": "@weights"},
        "archive": {**binary, "description": "Or a zip or tar of both.", "example": "@archive"},
    }
    schema = {"type": "object", "properties": properties, "required": list(fields)}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    }


_NAME_FIELD = {
    "name": {
        "type": "string",
        "pattern": f"^{NAME_PATTERN}$",
        "description": "The new adapter's name.",
        "example": "support-de",
    }
}


class _Upload:
    """A parsed multipart form."""

    def __init__(self, files: Mapping[str, IO[bytes]], name: str | None) -> None:
        self.files = files
        self.name = name

    def stage(self, services: Services, then: Callable[[FilePath], T]) -> T:
        """Write the files to a staging folder, and go on with it. Blocks: for a worker thread."""
        limit = services.settings.max_upload_bytes
        with services.store.staging() as folder:
            if "archive" in self.files:
                unpack(self.files["archive"], folder, limit)
            else:
                save_files(self.files["config"], self.files["weights"], folder, limit)
            return then(folder)


async def _read_upload(request: Request, named: bool) -> _Upload:
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise ApiError(
            400,
            "An adapter comes as multipart/form-data: config and weights, or archive.",
            code="not_multipart",
            param="body",
        )
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
    return _Upload(files, name)


@router.post(
    "",
    status_code=201,
    responses=_errors(400, 409, 413, 507)
    | {200: {"model": CheckedUpload, "description": "The dry run's result."}},
    openapi_extra=_form(_NAME_FIELD),
)
async def add(
    request: Request, response: Response, services: ServicesDep, dry_run: DryRun = False
) -> Adapter | CheckedUpload:
    """Add an adapter: what PEFT's `save_pretrained` wrote, as two files or one archive."""
    upload = await _read_upload(request, named=True)
    name = upload.name
    if name is not None:
        services.registry.check_name(name)
    if dry_run:
        response.status_code = 200
        return await _check(upload, services)
    if name is None:
        fix = "send the adapter's name as a form field"
        raise InvalidAdapter([Fault("name", "is missing", fix)])
    revision, warnings = await to_thread.run_sync(
        lambda: upload.stage(services, lambda folder: services.registry.add(name, folder))
    )
    response.headers["ETag"] = revision.etag
    response.headers["Location"] = f"/v1/adapters/{name}"
    return _adapter(services, revision, warnings=warnings)


async def _check(upload: _Upload, services: Services) -> CheckedUpload:
    vectors, warnings = await to_thread.run_sync(
        lambda: upload.stage(services, services.registry.check)
    )
    return CheckedUpload(targets=len(vectors.vectors), nbytes=vectors.nbytes, warnings=warnings)


@router.get("", responses=_errors(400))
def list_adapters(
    services: ServicesDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Page size.", examples=[100])] = 100,
    after: Annotated[
        str | None, Query(description="The last name of the page before.", examples=["a"])
    ] = None,
) -> AdapterList:
    """Every adapter, in order of names."""
    names = services.store.names(after, limit + 1)
    page = [services.store.current(name) for name in names[:limit] if name in services.store]
    return AdapterList(
        data=[_adapter(services, revision) for revision in page],
        next=names[limit - 1] if len(names) > limit else None,
    )


@router.get("/{name}", responses=_errors(404))
def get(name: Name, response: Response, services: ServicesDep) -> Adapter:
    """One adapter's current revision."""
    revision = services.store.current(name)
    response.headers["ETag"] = revision.etag
    return _adapter(services, revision)


@router.put("/{name}", responses=_errors(400, 404, 412, 413, 507), openapi_extra=_form({}))
async def replace(
    name: Name,
    request: Request,
    response: Response,
    services: ServicesDep,
    if_match: IfMatch = None,
    dry_run: DryRun = False,
) -> Adapter | CheckedUpload:
    """A new revision. Running requests finish on the one that they began with."""
    services.store.current(name)
    upload = await _read_upload(request, named=False)
    if dry_run:
        return await _check(upload, services)
    revision, changed, warnings = await to_thread.run_sync(
        lambda: upload.stage(
            services, lambda folder: services.registry.replace(name, folder, if_match)
        )
    )
    response.headers["ETag"] = revision.etag
    return _adapter(services, revision, warnings=warnings, unchanged=not changed)


@router.delete("/{name}", status_code=204, responses=_errors(404, 412, 507))
def delete(name: Name, services: ServicesDep, if_match: IfMatch = None) -> None:
    """The name is gone at once; running requests finish."""
    services.registry.delete(name, if_match)


@router.get("/{name}/files/{file}", responses=_errors(400, 404), response_class=FileResponse)
def download(
    name: Name,
    file: Annotated[
        Literal["adapter_config.json", "adapter_model.safetensors"],
        Path(description="Which file.", examples=["adapter_config.json"]),
    ],
    services: ServicesDep,
) -> FileResponse:
    """A file as it was uploaded: `PeftModel.from_pretrained` loads the two."""
    revision = services.store.current(name)
    path = services.store.files(revision) / file
    return FileResponse(path, filename=file, headers={"ETag": revision.etag})


def _adapter(
    services: Services,
    revision: Revision,
    warnings: list[str] | None = None,
    unchanged: bool = False,
) -> Adapter:
    return Adapter(
        name=revision.name,
        revision=revision.number,
        digest=revision.digest,
        size=revision.size,
        created=revision.created,
        source=revision.source,
        parent=services.model_name,
        warnings=warnings or [],
        unchanged=unchanged,
    )
