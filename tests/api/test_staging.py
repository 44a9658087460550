"""The staging folder of an upload is removed when the upload ends."""

import asyncio
from io import BytesIO
from pathlib import Path

from adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from server.api.forms import Form
from server.api.staging import staged_upload
from server.services import Services
from tests.api.test_health import StartServer


async def staged_until(services: Services, error: BaseException) -> Path:
    """The folder of an upload that ends with this error."""
    form = Form({"config": BytesIO(b"{}"), "weights": BytesIO(b"")}, None)
    with services.uploads.share() as take:
        try:
            async with staged_upload(services, form, take) as staged:
                names = sorted(path.name for path in staged.folder.iterdir())
                assert names == [CONFIG_FILE, WEIGHTS_FILE]
                raise error
        except type(error):
            return staged.folder


def test_a_staging_folder_is_removed_when_its_upload_is_refused(start_server: StartServer) -> None:
    _, services = start_server()

    assert not asyncio.run(staged_until(services, ValueError())).exists()


def test_a_cancelled_upload_leaves_its_folder_to_the_thread_that_may_still_use_it(
    start_server: StartServer,
) -> None:
    _, services = start_server()

    assert asyncio.run(staged_until(services, asyncio.CancelledError())).is_dir()
