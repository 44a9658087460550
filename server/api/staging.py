"""Puts the files of an upload into a staging folder, for the registry to check and to store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from anyio import CapacityLimiter, to_thread

from infuse.server.api.forms import Form
from infuse.server.api.published import Published
from infuse.server.caller import Caller
from infuse.server.services import Services
from infuse.server.uploads import Take


@dataclass(frozen=True, slots=True)
class StagedUpload:
    folder: Path
    source: str
    """Where the files come from, as a revision records it."""


@asynccontextmanager
async def staged_upload(
    services: Services, caller: Caller, upload: Form | Published, take: Take
) -> AsyncIterator[StagedUpload]:
    """Within: the upload's files, which were written on a thread or fetched. `take` is told of each
    piece before it is written."""
    sources = services.sources.limited_to(caller.scope.source_prefixes)
    if isinstance(upload, Published):
        # Before it waits for a thread.
        sources.check(upload.source)
    async with _staging_folder(services) as folder:
        if isinstance(upload, Published):
            source = await sources.fetch(upload.source, folder, take)
        else:
            limit = services.settings.max_upload_bytes
            source = await to_thread.run_sync(
                upload.save, folder, limit, take, limiter=services.staging
            )
        yield StagedUpload(folder, source)


@asynccontextmanager
async def _staging_folder(services: Services) -> AsyncIterator[Path]:
    """A folder of the registry's for an upload, made and removed on threads."""
    staging = services.registry.staging()
    folder = await to_thread.run_sync(staging.__enter__, limiter=services.staging)
    # The removal waits for no other upload's thread.
    own = CapacityLimiter(1)
    try:
        yield folder
    except asyncio.CancelledError:
        # Only the drain cancels. Dropped, a context that was entered would remove its folder.
        services.abandoned.append(staging)
        raise
    except BaseException as error:
        cause = (type(error), error, error.__traceback__)
        await to_thread.run_sync(staging.__exit__, *cause, limiter=own)
        raise
    await to_thread.run_sync(staging.__exit__, None, None, None, limiter=own)
