"""A server whose disk is full, read-only, frozen, broken or gone."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.api.archives import form_of, read_adapter
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, ALL_USAGE, Place, Serve, complete, error_of, text_of
from tests.api.stores import serve as serve
from tests.api.test_streaming import eventually
from tests.disks import Disk, disk, fill, mounts, small_disk

pytestmark = mounts
_MEBIBYTE = 1 << 20


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, None)


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Disk]:
    """A disk that a test may break."""
    with disk(tmp_path) as made:
        yield made


def all_changes(client: httpx.Client, folders: dict[str, Path]) -> list[httpx.Response]:
    """The answers to every kind of change, by an adapter that is there in two revisions."""
    form = form_of(read_adapter(folders["queries"]))
    path = f"{ADAPTERS}/mine"
    return [
        client.post(ADAPTERS, data={"name": "new"}, files=form),
        client.put(path, files=form),
        client.patch(path, json={"description": "x"}),
        client.post(f"{path}/rollback", json={"revision": 1}),
        client.delete(path),
    ]


def two_revisions(client: httpx.Client, folders: dict[str, Path]) -> str:
    """What the second one answers; the first one is on the disk alone."""
    upload(client, "mine", folders["mlp"])
    upload(client, "mine", folders["default"], "PUT")
    return text_of(client, "mine")


BROKEN: dict[str, tuple[Callable[[Disk], None], str]] = {
    "read-only": (Disk.become_read_only, "Read-only file system"),
    "without power": (Disk.lose_power, "Input/output error"),
    "unreadable": (Disk.lose_sectors, ""),
}


@pytest.mark.fault(
    "disk",
    "The file system becomes read-only while the server runs",
    by="an error that ext4 finds in itself",
    promise="Changes are refused with 503 and the reason, and change nothing; every revision is "
    "served; `/health/ready` and `infuse_adapters_read_only` say so. Mounted anew, the disk has "
    "what was acknowledged.",
    case="read-only",
)
@pytest.mark.fault(
    "disk",
    "The device loses its power while the server runs",
    by="ext4's shutdown",
    promise="Changes, and revisions that are not in memory, are 503 with the reason; what is in "
    "memory is served. Mounted anew, the disk has what was acknowledged.",
    case="without power",
)
@pytest.mark.fault(
    "disk",
    "Sectors cannot be read or written any more",
    by="a loop device whose file is cut",
    promise="Changes, and revisions that are not in memory, are 503 with the reason; what is in "
    "memory is served.",
    case="unreadable",
)
@pytest.mark.parametrize("how", BROKEN)
def test_a_disk_that_breaks_refuses_changes_with_the_reason_and_what_can_be_read_is_served(
    serve: Serve, broken: Disk, adapter_folders: dict[str, Path], how: str
) -> None:
    lose, reason = BROKEN[how]
    folder = broken.folder / "adapters"
    with serve(adapters_dir=folder) as client:
        text = two_revisions(client, adapter_folders)
        lose(broken)
        for answer in all_changes(client, adapter_folders):
            error = error_of(answer, 503)
            assert error["code"] == "storage_unavailable"
            assert reason in error["message"]
        assert text_of(client, "mine") == text
        assert complete(client, "tiny").status_code == 200
        assert [each["name"] for each in client.get(ADAPTERS).json()["data"]] == ["mine"]
        assert client.get(f"{ADAPTERS}/mine").json()["revision"] == 2
        first = complete(client, "mine@1")
        if how == "read-only":
            assert first.status_code == 200
            ready = client.get("/health/ready")
            assert (ready.status_code, ready.json()["changes"]) == (200, "read_only")
            assert "infuse_adapters_read_only 1.0" in client.get("/metrics").text
        else:
            assert error_of(first, 503)["code"] == "storage_unavailable"
        assert client.get("/health/live").status_code == 200
    if how != "unreadable":
        broken.unmount()
        broken.mount()
        with serve(adapters_dir=folder) as client:
            assert text_of(client, "mine") == text
            assert all(answer.is_success for answer in all_changes(client, adapter_folders))


@pytest.mark.fault(
    "disk",
    "The merges' file system becomes read-only",
    by="an error that ext4 finds in itself",
    promise="Merges are refused, and those that are there stay, with 503 and the reason.",
)
def test_merges_on_a_disk_that_became_read_only_are_503(
    serve: Serve, broken: Disk, adapter_folders: dict[str, Path]
) -> None:
    with serve(merges_dir=broken.folder / "merges") as client:
        upload(client, "mine", adapter_folders["mlp"])
        job = client.post("/v1/merges", json={"adapter": "mine"}).json()["id"]
        assert eventually(
            lambda: client.get(f"/v1/merges/{job}").json()["state"] == "succeeded", 60
        )
        broken.become_read_only()
        for answer in (
            client.post("/v1/merges", json={"adapter": "mine"}),
            client.delete(f"/v1/merges/{job}"),
        ):
            assert "Read-only file system" in error_of(answer, 503)["message"]
        assert [each["id"] for each in client.get("/v1/merges").json()["data"]] == [job]


@pytest.mark.fault(
    "disk",
    "The volume is unmounted under the server",
    by="a lazy `umount`",
    promise="Changes and `/health/ready` are 503 with the reason; what is in memory is served. "
    "Mounted again, it takes changes without a restart.",
)
def test_a_volume_that_was_unmounted_and_mounted_again_takes_changes_again(
    serve: Serve, broken: Disk, adapter_folders: dict[str, Path]
) -> None:
    with serve(adapters_dir=broken.folder / "adapters") as client:
        text = two_revisions(client, adapter_folders)
        broken.unmount()
        for answer in [*all_changes(client, adapter_folders), client.get("/health/ready")]:
            assert "was removed, moved or replaced" in error_of(answer, 503)["message"]
        assert text_of(client, "mine") == text
        broken.mount()
        assert client.get("/health/ready").status_code == 200
        assert all(answer.is_success for answer in all_changes(client, adapter_folders))


@pytest.mark.fault(
    "disk",
    "The disk hangs, and goes on later",
    by="`fsfreeze`",
    promise="A change waits, and is made when the disk goes on. All else is answered meanwhile: "
    "requests, lists, health, metrics; what is used then is counted afterwards.",
)
def test_a_disk_that_hangs_holds_up_changes_alone(
    serve: Serve, broken: Disk, adapter_folders: dict[str, Path]
) -> None:
    own = {"adapters_dir": broken.folder / "adapters", "usage_dir": broken.folder / "usage"}
    with serve(**own) as client, ThreadPoolExecutor(1) as thread:
        text = two_revisions(client, adapter_folders)
        broken.freeze()
        change = thread.submit(upload, client, "new", adapter_folders["queries"])
        for _ in range(3):
            assert text_of(client, "mine") == text
            assert complete(client, "mine@1").status_code == 200
        for path in (ADAPTERS, f"{ADAPTERS}/mine", "/health/live", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
        assert not change.done()
        broken.thaw()
        assert change.result(60).status_code == 201
        assert complete(client, "new").status_code == 200
        counted = {each["adapter"]: each["requests"] for each in usage(client)}
        assert counted == {"mine": 7, "new": 1}


def usage(client: httpx.Client) -> list[dict[str, object]]:
    """Once nothing is unwritten any more."""

    def is_written() -> bool:
        return "infuse_usage_requests_unwritten 0.0" in client.get("/metrics").text

    assert eventually(is_written)
    return list(client.get("/v1/usage", params=ALL_USAGE).json()["data"])


@pytest.mark.fault(
    "disk",
    "The disk is slow: it stands still most of the time",
    by="`fsfreeze` again and again",
    promise="Changes take longer and are made; requests are answered.",
)
def test_a_disk_that_stands_still_again_and_again_makes_every_change(
    serve: Serve, broken: Disk, adapter_folders: dict[str, Path]
) -> None:
    ended = threading.Event()

    def stand_still() -> None:
        while not ended.is_set():
            broken.freeze()
            time.sleep(0.05)
            broken.thaw()

    with serve(adapters_dir=broken.folder / "adapters") as client, ThreadPoolExecutor(1) as thread:
        text = two_revisions(client, adapter_folders)
        slow = thread.submit(stand_still)
        try:
            assert text_of(client, "mine") == text
            assert all(answer.is_success for answer in all_changes(client, adapter_folders))
        finally:
            ended.set()
            slow.result()


@pytest.mark.fault(
    "disk",
    "The disk has no bytes left",
    by="a small tmpfs",
    promise="An upload is refused with 507 `storage_full` and changes nothing; all adapters are "
    "served. It is taken once there is room.",
    case="bytes",
)
@pytest.mark.fault(
    "disk",
    "The disk has no inodes left",
    by="a tmpfs of few files",
    promise="As where it has no bytes left.",
    case="files",
)
@pytest.mark.parametrize("left", ["bytes", "files"])
def test_an_upload_to_a_full_disk_is_507_and_is_taken_once_there_is_room(
    serve: Serve, tmp_path: Path, adapter_folders: dict[str, Path], left: str
) -> None:
    with (
        small_disk(tmp_path / "small", 4 * _MEBIBYTE, files=100) as folder,
        serve(adapters_dir=folder / "adapters") as client,
    ):
        text = two_revisions(client, adapter_folders)
        fillers = [fill(folder)] if left == "bytes" else fill_with_files(folder)
        for answer in (
            upload(client, "new", adapter_folders["queries"]),
            upload(client, "mine", adapter_folders["queries"], "PUT"),
        ):
            assert error_of(answer, 507)["code"] == "storage_full"
        assert text_of(client, "mine") == text
        assert client.get(f"{ADAPTERS}/mine").json()["revision"] == 2
        assert complete(client, "new").status_code == 404
        for each in fillers:
            each.unlink()
        assert upload(client, "new", adapter_folders["queries"]).status_code == 201


def fill_with_files(folder: Path) -> list[Path]:
    made: list[Path] = []
    try:
        while True:
            path = folder / f"filler-{len(made)}"
            path.touch()
            made.append(path)
    except OSError:
        return made


@pytest.mark.fault(
    "disk",
    "The disk of the usage is full",
    by="a small tmpfs",
    promise="Requests are answered; usage is kept in memory, `/metrics` says how much, and it is "
    "written once there is room.",
)
def test_usage_that_finds_no_room_is_counted_once_there_is_some(
    serve: Serve, tmp_path: Path
) -> None:
    with (
        small_disk(tmp_path / "small", _MEBIBYTE) as folder,
        serve(usage_dir=folder) as client,
    ):
        filler = fill(folder)
        for _ in range(3):
            assert complete(client, "tiny").status_code == 200
        assert "infuse_usage_requests_unwritten 3.0" in client.get("/metrics").text
        filler.unlink()
        assert complete(client, "tiny").status_code == 200
        assert [each["requests"] for each in usage(client)] == [4]


@pytest.mark.fault(
    "disk",
    "The disk of the bucket's local copies is full",
    by="a small tmpfs",
    promise="What is in memory is served; an adapter that must be fetched is 507 until there is "
    "room.",
)
def test_an_adapter_that_finds_no_room_in_the_cache_is_507_until_there_is_some(
    serve: Serve, s3: str, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    with serve(adapters_dir=s3, adapters_cache_dir=tmp_path / "first") as client:
        text = two_revisions(client, adapter_folders)
    with (
        small_disk(tmp_path / "small", 4 * _MEBIBYTE) as folder,
        serve(adapters_dir=s3, adapters_cache_dir=folder) as client,
    ):
        assert text_of(client, "mine") == text
        filler = fill(folder)
        assert error_of(complete(client, "mine@1"), 507)["code"] == "storage_full"
        assert text_of(client, "mine") == text
        filler.unlink()
        assert complete(client, "mine@1").status_code == 200
