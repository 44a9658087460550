"""`/v1/merges`: jobs that fold adapters into a copy of the base model."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path as FilePath
from typing import Annotated, BinaryIO

from fastapi import APIRouter, Depends, Path, Query, Response
from starlette.responses import StreamingResponse

from infuse.adapters.errors import MergeNotDone, UnknownMerge
from infuse.server.api.merge_schemas import Merge, MergeBody, MergeList
from infuse.server.auth import CallerDep
from infuse.server.openapi import READS, errors, header
from infuse.server.services import ServicesDep

router = APIRouter(prefix="/v1/merges", tags=["merges"])

Id = Annotated[
    str,
    Path(
        description="The merge's id.", examples=["merge-20261124061500123456-9f3a"], max_length=128
    ),
]


def _own(id: Id, services: ServicesDep, caller: CallerDep) -> str:
    if not caller.owns(services.merges.get(id).by):
        raise UnknownMerge(id)
    return id


OwnId = Annotated[str, Depends(_own)]
"""A merge that the caller may see."""
_CHUNK = 1 << 20
"""Bytes of an archive that are sent at once."""
_END = bytes(2 * tarfile.BLOCKSIZE)


@router.post(
    "",
    status_code=202,
    responses=errors(404, 409, 429, *READS)
    | {202: {"headers": {"Location": header("Where to ask how far it is.")}}},
)
def start(body: MergeBody, response: Response, services: ServicesDep, caller: CallerDep) -> Merge:
    """Fold adapters, as they are now, into a copy of the base model."""
    for part in body.parts:
        caller.check_sees(part.name)
    vectors, recipe = services.registry.mixture(body.parts, body.composition or "product")
    job = services.merges.submit(vectors, recipe, caller.name, caller.scope.max_merges)
    response.headers["Location"] = f"/v1/merges/{job.id}"
    return Merge.of(job)


@router.get("")
def list_merges(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[int, Query(ge=1, le=1000, description="Page size.", examples=[100])] = 100,
    after: Annotated[
        str | None,
        Query(
            description="The last id of the page before.",
            examples=["merge-20261124061500123456-9f3a"],
        ),
    ] = None,
) -> MergeList:
    """Every merge that was not deleted and that the key may see, oldest first."""
    page = services.merges.page(after, limit + 1, caller.owns)
    return MergeList(
        data=[Merge.of(job) for job in page[:limit]],
        next=page[limit - 1].id if len(page) > limit else None,
    )


@router.get("/{id}", responses=errors(404))
def get(id: OwnId, services: ServicesDep) -> Merge:
    """How far a merge is."""
    return Merge.of(services.merges.get(id))


@router.get(
    "/{id}/archive",
    responses=errors(404, 409, 503)
    | {200: {"content": {"application/x-tar": {}}, "description": "The model's folder, as a tar."}},
    response_class=StreamingResponse,
)
def download(id: OwnId, services: ServicesDep) -> StreamingResponse:
    """The merged model: a folder that plain transformers loads."""
    folder = services.merges.result(id)
    files = ExitStack()
    try:
        # Opened before the first byte goes: a DELETE meanwhile takes nothing from this answer.
        opened = [files.enter_context(path.open("rb")) for path in sorted(folder.iterdir())]
    except OSError:
        files.close()
        services.merges.get(id)
        raise MergeNotDone(id, "being deleted") from None
    members = [_Member(f"{id}/{FilePath(file.name).name}", file) for file in opened]
    return StreamingResponse(
        _tar(members, files),
        media_type="application/x-tar",
        headers={
            "Content-Length": str(sum(each.nbytes for each in members) + len(_END)),
            "Content-Disposition": f'attachment; filename="{id}.tar"',
        },
    )


@router.delete("/{id}", status_code=204, response_class=Response, responses=errors(404, 503))
def delete(id: OwnId, services: ServicesDep) -> None:
    """Cancel a merge that waits or runs; forget one that has ended, and its model with it."""
    services.merges.remove(id)


class _Member:
    """A file of a tar: its header, its bytes, and zeros up to a whole block."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        info = tarfile.TarInfo(name)
        info.size = os.fstat(file.fileno()).st_size
        self.header = info.tobuf(tarfile.GNU_FORMAT)
        self.file = file
        self.padding = bytes(-info.size % tarfile.BLOCKSIZE)
        self.nbytes = len(self.header) + info.size + len(self.padding)


def _tar(members: list[_Member], files: ExitStack) -> Iterator[bytes]:
    with files:
        for each in members:
            yield each.header
            while chunk := each.file.read(_CHUNK):
                yield chunk
            yield each.padding
        yield _END
