"""The admin API: adds, changes and deletes adapters while requests run."""

from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from infuse.adapters.errors import AdapterExists, Fault, InvalidAdapter, UnknownAdapter
from infuse.adapters.registry import Part
from infuse.adapters.storage.names import MAX_NAME
from infuse.adapters.storage.revision import DetailsChange, Origin
from infuse.server.api.adapter_schemas import (
    Adapter,
    AdapterList,
    CheckedUpload,
    CombineBody,
    DetailsBody,
    NamedSourceBody,
    RevisionList,
    RollbackBody,
    SourceBody,
    adapter_of,
    revision_of,
)
from infuse.server.api.forms import NAME_FIELD, Form, read_form, upload_body
from infuse.server.api.published import Published, read_published
from infuse.server.api.staging import staged_upload
from infuse.server.auth import CallerDep
from infuse.server.caller import Caller
from infuse.server.errors import ApiError, error_response
from infuse.server.openapi import CHANGES, ETAG, READS, errors, header
from infuse.server.services import Services, ServicesDep
from infuse.server.uploads import Take


class NameConvertor(StringConvertor):
    """Matches a name in a path. It may hold one slash, as it is or as %2F; what follows a name in
    other paths is no part of it (see `infuse.adapters.storage.names`)."""

    regex = r"[^/]+(?:/(?!(?:files|revisions|rollback|vectors)(?:/|$))[^/]+)?"


register_url_convertor("adapter", NameConvertor())
router = APIRouter(prefix="/v1/adapters", tags=["adapters"])

Name = Annotated[
    str, Path(description="The adapter's name.", examples=["support-de"], max_length=MAX_NAME)
]


async def _seen(name: Name, caller: CallerDep) -> str:
    caller.check_sees(name)
    return name


async def _changed(name: Name, caller: CallerDep) -> str:
    caller.check_changes(name)
    return name


SeenName = Annotated[str, Depends(_seen)]
ChangedName = Annotated[str, Depends(_changed)]
"""The adapter that a path names, which the caller's key may see, or change too."""


async def _share(services: ServicesDep, caller: CallerDep) -> AsyncIterator[Take]:
    """One upload's share of the upload budget, until the upload is answered."""
    with services.uploads.share(caller.name) as take:
        yield take


TakeDep = Annotated[Take, Depends(_share)]
IfMatch = Annotated[
    str | None,
    Header(
        description="Only if this is still the adapter's ETag.", examples=['"3-9f86d081884c7d65"']
    ),
]
DryRun = Annotated[bool, Query(description="Check the upload and keep nothing.", examples=[True])]
_NOT_ALLOWED = (
    "The key may not do this, the source is not allowed, or no trusted signer has signed the files."
)
_CREATED = {"headers": ETAG | {"Location": header("The new adapter.")}}
_FILE: dict[str, object] = {"application/json": {}, "application/octet-stream": {}}


@router.post(
    "",
    status_code=201,
    responses=errors(409, 502, 504, *CHANGES, said={403: _NOT_ALLOWED})
    | {200: {"model": CheckedUpload, "description": "The dry run's result."}, 201: _CREATED},
    openapi_extra=upload_body(NAME_FIELD, NamedSourceBody),
)
async def add(
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    take: TakeDep,
    dry_run: DryRun = False,
) -> Adapter | CheckedUpload:
    """Add an adapter: what PEFT's `save_pretrained` wrote, as two files, as one archive, or from
    where it was published."""
    upload = await _read(request, services, take, named=True)
    name = upload.name
    if name is not None:
        services.registry.check_name(name)
        caller.check_creates(name)
    if dry_run:
        response.status_code = 200
        return await _check(services, caller, upload, take)
    if name is None:
        fix = "send the adapter's name beside its files or its source"
        raise InvalidAdapter([Fault("name", "is missing", fix)])
    # Before anything is unpacked or fetched; the store decides.
    if name in services.registry.stored:
        raise AdapterExists(name)
    async with staged_upload(services, caller, upload, take) as staged:
        origin = Origin(source=staged.source, by=caller.name)
        revision, warnings = await to_thread.run_sync(
            services.registry.add,
            name,
            staged.folder,
            origin,
            caller.quota,
            limiter=services.staging,
        )
    response.headers["ETag"] = revision.etag
    response.headers["Location"] = f"/v1/adapters/{name}"
    return adapter_of(services, caller, revision, warnings)


async def _read(request: Request, services: Services, take: Take, named: bool) -> Form | Published:
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() == "application/json":
        return await read_published(request, named)
    return await read_form(request, named, take, services.settings.form_bytes)


async def _check(
    services: Services, caller: Caller, upload: Form | Published, take: Take
) -> CheckedUpload:
    async with staged_upload(services, caller, upload, take) as staged:
        vectors, warnings = await to_thread.run_sync(
            services.registry.check, staged.folder, limiter=services.staging
        )
    return CheckedUpload(targets=len(vectors.vectors), nbytes=vectors.nbytes, warnings=warnings)


@router.post("/combine", status_code=201, responses=errors(404, 409, *READS) | {201: _CREATED})
async def combine(
    body: CombineBody, response: Response, services: ServicesDep, caller: CallerDep
) -> Adapter:
    """Make a new adapter out of others. It records how it was made."""
    caller.check_creates(body.name)
    for part in body.adapters:
        caller.check_sees(part.name)
    made = partial(
        services.registry.combine,
        body.name,
        [Part(part.name, part.weight) for part in body.adapters],
        body.method,
        missing=body.missing,
        density=body.density,
        seed=body.seed,
        by=caller.name,
        quota=caller.quota,
    )
    # It writes and checks files as an upload does.
    revision, warnings = await to_thread.run_sync(made, limiter=services.staging)
    response.headers["ETag"] = revision.etag
    response.headers["Location"] = f"/v1/adapters/{body.name}"
    return adapter_of(services, caller, revision, warnings)


@router.get("")
def list_adapters(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Page size.", examples=[100])] = 100,
    after: Annotated[
        str | None, Query(description="The last name of the page before.", examples=["a"])
    ] = None,
) -> AdapterList:
    """Every adapter that the key may see, in order of names."""
    names = caller.visible(services.registry.stored, after, limit + 1)
    page = []
    for name in names[:limit]:
        # It may have been deleted since the names were read.
        with suppress(UnknownAdapter):
            page.append(adapter_of(services, caller, services.registry.stored.current(name)))
    return AdapterList(data=page, next=names[limit - 1] if len(names) > limit else None)


@router.get("/{name:adapter}", responses=errors(404) | {200: {"headers": ETAG}})
def get(name: SeenName, response: Response, services: ServicesDep, caller: CallerDep) -> Adapter:
    """One adapter's current revision."""
    revision = services.registry.stored.current(name)
    response.headers["ETag"] = revision.etag
    return adapter_of(services, caller, revision)


@router.put(
    "/{name:adapter}",
    responses=errors(404, 412, 502, 504, *READS, said={403: _NOT_ALLOWED})
    | {200: {"headers": {"ETag": header("Of the new revision.", always=False)}}},
    openapi_extra=upload_body({}, SourceBody),
)
async def replace(
    name: ChangedName,
    request: Request,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    take: TakeDep,
    if_match: IfMatch = None,
    dry_run: DryRun = False,
) -> Adapter | CheckedUpload:
    """A new revision. Running requests finish on the one that they began with."""
    services.registry.stored.current(name)
    upload = await _read(request, services, take, named=False)
    if dry_run:
        return await _check(services, caller, upload, take)
    async with staged_upload(services, caller, upload, take) as staged:
        origin = Origin(source=staged.source, by=caller.name)
        revision, is_new, warnings = await to_thread.run_sync(
            services.registry.replace,
            name,
            staged.folder,
            if_match,
            origin,
            caller.quota,
            limiter=services.staging,
        )
    services.engine.wake()
    response.headers["ETag"] = revision.etag
    return adapter_of(services, caller, revision, warnings, unchanged=not is_new)


@router.patch("/{name:adapter}", responses=errors(404, 409, 412, *READS) | {200: {"headers": ETAG}})
def describe(
    name: ChangedName,
    body: DetailsBody,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch = None,
) -> Adapter:
    """Set description, tags, pinned or enabled. A disabled adapter's running requests finish."""
    if body.pinned is not None:
        caller.check_pins()
    change = DetailsChange(
        description=body.description,
        tags=None if body.tags is None else tuple(body.tags),
        pinned=body.pinned,
        enabled=body.enabled,
    )
    revision, details = services.registry.describe(name, change, if_match, caller.name)
    services.engine.wake()
    response.headers["ETag"] = revision.etag
    return adapter_of(services, caller, revision, details=details)


@router.delete(
    "/{name:adapter}",
    status_code=204,
    response_class=Response,
    responses=errors(404, 412, *CHANGES),
)
def delete(
    name: ChangedName, services: ServicesDep, caller: CallerDep, if_match: IfMatch = None
) -> None:
    """The name is gone at once; running requests finish."""
    services.registry.delete(name, if_match, caller.name)
    services.engine.wake()


@router.get("/{name:adapter}/revisions", responses=errors(404))
def list_revisions(name: SeenName, services: ServicesDep, caller: CallerDep) -> RevisionList:
    """The revisions that can be asked for as `name@revision` and rolled back to."""
    revisions = services.registry.stored.revisions(name)
    return RevisionList(data=[revision_of(services, caller, each) for each in revisions])


@router.post(
    "/{name:adapter}/rollback", responses=errors(404, 412, *READS) | {200: {"headers": ETAG}}
)
def roll_back(
    name: ChangedName,
    body: RollbackBody,
    response: Response,
    services: ServicesDep,
    caller: CallerDep,
    if_match: IfMatch = None,
) -> Adapter:
    """A new revision with an old one's content."""
    # On a thread of the routes': no slow upload delays the way back to what worked.
    revision, is_new = services.registry.roll_back(name, body.revision, if_match, caller.name)
    services.engine.wake()
    response.headers["ETag"] = revision.etag
    return adapter_of(services, caller, revision, unchanged=not is_new)


@router.get(
    "/{name:adapter}/files/{file}",
    responses=errors(404, 416, *READS)
    | {
        status: {"description": text, "content": _FILE, "headers": ETAG}
        for status, text in {200: "The file.", 206: "The bytes that `Range` asks for."}.items()
    },
    response_class=FileResponse,
)
def download(
    name: SeenName,
    file: Annotated[
        Literal[
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "chat_template.jinja",
            "README.md",
            "model.sig",
        ],
        Path(description="Which file.", examples=["adapter_config.json"]),
    ],
    services: ServicesDep,
) -> FileResponse:
    """A file as it was uploaded: `PeftModel.from_pretrained` loads the first two, and
    `AutoTokenizer.from_pretrained` the others but its card and its signature, where the adapter has
    them."""
    revision = services.registry.stored.current(name)
    path = services.registry.stored.verified(revision) / file
    if not path.is_file():
        raise ApiError(404, f"The adapter '{name}' has no {file}.", param="file")
    kind = "application/json" if path.suffix == ".json" else "application/octet-stream"
    return File(path, filename=file, media_type=kind, headers={"ETag": revision.etag})


class File(FileResponse):
    """A file or a part of it; a `Range` that cannot be served is refused in our shape."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal: ApiError | None = None

        async def watched(message: Message) -> None:
            nonlocal refusal
            if message["type"] == "http.response.start" and message["status"] >= 400:
                bounds = Headers(raw=message["headers"]).get("content-range")
                refusal = ApiError(
                    message["status"],
                    f"The file cannot be cut to this Range; {bounds or 'send bytes=first-last'}.",
                    code="invalid_range",
                    param="Range",
                    headers={} if bounds is None else {"Content-Range": bounds},
                )
            elif refusal is None:
                await send(message)

        await super().__call__(scope, receive, watched)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
