"""Archives that are damaged, or made to do harm."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.api.archives import CONFIG, WEIGHTS, TarKind, read_adapter, tar_of, zip_of
from tests.api.conftest import RunningServer
from tests.api.test_adapters import ADAPTERS, add_archive, forget_uploads
from tests.api.test_uploads import (
    Files,
    faults_of,
    on_disk,
    refused,
)
from tests.api.test_uploads import alone as alone
from tests.api.test_uploads import files as files
from tests.api.test_uploads import (
    nothing_stays_and_nobody_is_disturbed as nothing_stays_and_nobody_is_disturbed,
)

OUTSIDE = ["../" * 12 + "OUT/x", "/OUT/x", "a/../../x", "..\\..\\x", "C:\\x", "a\\b", "x/.."]


def problem_of(response: httpx.Response) -> str:
    [fault] = faults_of(response)
    assert fault["field"] == "archive"
    assert fault["fix"]
    return fault["problem"]


def zip_with(files: Files, entry: zipfile.ZipInfo, data: bytes = b"x") -> bytes:
    packed = io.BytesIO(zip_of(files))
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(entry, data)
    return packed.getvalue()


def tar_with(files: Files, kind: bytes, name: str = "extra", target: str = "") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    packed = io.BytesIO(tar_of(files))
    with tarfile.open(fileobj=packed, mode="a") as archive:
        archive.addfile(entry)
    return packed.getvalue()


# Climbing out


@refused
@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_an_entry_that_leads_out_refuses_the_archive(
    client: httpx.Client,
    files: Files,
    path: str,
    pack: Callable[[Files], bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    outside = tmp_path_factory.mktemp("out")
    path = path.replace("/OUT", str(outside)).replace("x/..", "x/../../y")
    climbing = pack(files | {path: b"x"})

    problem = problem_of(add_archive(client, "refused", climbing))

    assert "leads out of the archive" in problem
    assert list(outside.iterdir()) == []


@refused
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_the_adapter_itself_cannot_lie_outside(
    client: httpx.Client, files: Files, file: str
) -> None:
    moved = {f"../{name}" if name == file else name: data for name, data in files.items()}

    assert "leads out" in problem_of(add_archive(client, "refused", zip_of(moved)))


@refused
@pytest.mark.parametrize("target", ["/etc/passwd", WEIGHTS])
@pytest.mark.parametrize("name", ["extra", CONFIG])
def test_a_link_in_a_zip_is_refused(
    client: httpx.Client, files: Files, name: str, target: str
) -> None:
    link = zipfile.ZipInfo(name)
    link.external_attr = 0o120777 << 16
    others = {path: data for path, data in files.items() if path != name}

    packed = zip_with(others, link, target.encode())

    assert "is a link" in problem_of(add_archive(client, "refused", packed))


@refused
@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
@pytest.mark.parametrize("name", ["extra", CONFIG])
def test_a_link_or_a_device_in_a_tar_is_refused(
    client: httpx.Client, files: Files, kind: bytes, name: str
) -> None:
    others = {path: data for path, data in files.items() if path != name}

    packed = tar_with(others, kind, name, target="/etc/passwd")

    assert "is a link or a device" in problem_of(add_archive(client, "refused", packed))


# Unpacking to more than one bargained for


def tar_header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT)


def gzipped(header: bytes, zeros: int) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(zeros >> 20):
            file.write(bytes(1 << 20))
    return packed.getvalue()


def central_directory(entries: int) -> bytes:
    """A zip that holds names and no files."""
    name = b"x" * 10
    fields = (0x02014B50, 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name), 0, 0, 0, 0, 0, 0)
    listed = (struct.pack("<IHHHHHHIIIHHHHHII", *fields) + name) * entries
    count = min(entries, 0xFFFF)
    start = b"PK\3\4" + bytes(26)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, len(listed), len(start), 0)
    return start + listed + end


BOMBS: dict[str, Callable[[Files], bytes]] = {
    "zip": lambda files: zip_of(files | {WEIGHTS: bytes(80 << 20)}),
    "tar.gz": lambda _: gzipped(tar_header(WEIGHTS, 80 << 20), 80 << 20),
    "what is passed over": lambda _: gzipped(tar_header("notes.txt", 80 << 20), 80 << 20),
}


@refused
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_an_archive_cannot_unpack_past_the_limit_for_uploads(
    client: httpx.Client, server: RunningServer, files: Files, bomb: Callable[[Files], bytes]
) -> None:
    response = add_archive(client, "refused", bomb(files))

    assert response.status_code == 413
    error = response.json()["error"]
    assert error["code"] == "upload_too_large"
    assert str(server.services.settings.max_upload_bytes) in error["message"]


@refused
def test_a_zip_that_understates_its_sizes_is_refused(client: httpx.Client, files: Files) -> None:
    packed = bytearray(zip_of(files | {WEIGHTS: bytes(1 << 20)}))
    for place in (packed.rindex(b"PK\1\2") + 24, packed.rindex(b"PK\3\4") + 22):
        assert struct.unpack_from("<I", packed, place) == (1 << 20,)
        struct.pack_into("<I", packed, place, 100)

    assert "cannot be read" in problem_of(add_archive(client, "refused", bytes(packed)))


@refused
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_cannot_fill_memory_with_a_name(
    client: httpx.Client, server: RunningServer, kind: bytes
) -> None:
    packed = gzipped(tar_header("././@LongLink", 1 << 30, kind), 256 << 20)
    process = psutil.Process()
    before = process.memory_info().rss

    problem = problem_of(add_archive(client, "refused", packed))

    assert "takes 1073741824 bytes" in problem
    assert process.memory_info().rss - before < 64 << 20
    assert server.services.engine.stats().ready


@refused
@pytest.mark.parametrize("entries", [1001, 100_000])
def test_a_zip_of_too_many_entries_is_refused(client: httpx.Client, entries: int) -> None:
    problem = problem_of(add_archive(client, "refused", central_directory(entries)))

    assert "has more than 1000 entries" in problem or "part of its directory" in problem


@refused
@pytest.mark.parametrize("kind", ["w", "w:gz"])
def test_a_tar_of_too_many_entries_is_refused(
    client: httpx.Client, files: Files, kind: TarKind
) -> None:
    packed = tar_of({str(number): b"" for number in range(1001)} | files, kind)

    assert "more than 1000 entries" in problem_of(add_archive(client, "refused", packed))


# What does not belong in one


@refused
def test_an_encrypted_zip_is_refused(client: httpx.Client, files: Files) -> None:
    packed = bytearray(zip_of(files))
    for magic, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        packed[packed.index(magic) + flags] |= 1

    assert "is encrypted" in problem_of(add_archive(client, "refused", bytes(packed)))


@refused
@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_would_unpack_without_a_limit_is_refused(
    client: httpx.Client, files: Files, compression: int
) -> None:
    packed = zip_of(files, compression)

    assert "is not packed by deflate" in problem_of(add_archive(client, "refused", packed))


@refused
@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("inner", [zip_of, tar_of])
def test_an_archive_in_an_archive_is_not_unpacked(
    client: httpx.Client,
    files: Files,
    pack: Callable[[Files], bytes],
    inner: Callable[[Files], bytes],
) -> None:
    faults = faults_of(add_archive(client, "refused", pack({"adapter.zip": inner(files)})))

    assert [(fault["field"], fault["problem"]) for fault in faults] == [
        (CONFIG, "is missing"),
        (WEIGHTS, "is missing"),
    ]


@refused
@pytest.mark.parametrize("pack", [zip_of, tar_of])
def test_two_adapters_in_one_archive_are_refused(
    client: httpx.Client, files: Files, pack: Callable[[Files], bytes]
) -> None:
    twice = {f"{step}/{name}": data for step in ("1", "2") for name, data in files.items()}

    faults = faults_of(add_archive(client, "refused", pack(twice)))

    [fault] = faults
    assert (fault["field"], fault["problem"]) == (CONFIG, "lies in 2 folders: 1, 2")


@refused
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_file_that_comes_twice_is_refused(client: httpx.Client, files: Files, kind: str) -> None:
    if kind == "zip":
        packed = zip_with(files, zipfile.ZipInfo(CONFIG), b"{}")
    else:
        packed = tar_with(files, tarfile.REGTYPE, CONFIG)

    problem = problem_of(add_archive(client, "refused", packed))

    assert problem == f"holds {CONFIG} more than once"


@refused
def test_files_from_two_folders_make_no_adapter(client: httpx.Client, files: Files) -> None:
    apart = {f"{number}/{name}": data for number, (name, data) in enumerate(files.items())}

    assert "in different folders" in problem_of(add_archive(client, "refused", zip_of(apart)))


@refused
@pytest.mark.parametrize("pack", [zip_of, tar_of])
@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_folder_in_a_file_s_place_is_no_file(
    client: httpx.Client, files: Files, pack: Callable[[Files], bytes], file: str
) -> None:
    nested = {f"{name}/x" if name == file else name: data for name, data in files.items()}

    [fault] = faults_of(add_archive(client, "refused", pack(nested)))

    assert (fault["field"], fault["problem"]) == (file, "is missing")


# Damage


@refused
@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"hello"],
    ids=repr,
)
def test_what_is_no_archive_is_refused(client: httpx.Client, data: bytes) -> None:
    response = add_archive(client, "refused", data)

    assert all(fault["fix"] for fault in faults_of(response))


def saying_that_it_needs(packed: bytes, size: int) -> bytes:
    """An xz file whose header asks for a dictionary of another size, 2 to the power of `size`."""
    changed = bytearray(packed)
    start, end = 12, 12 + 4 * (packed[12] + 1)
    assert changed[start + 2 : start + 4] == b"\x21\x01", "LZMA2 and nothing else"
    changed[start + 4] = 2 * (size - 12)
    changed[end - 4 : end] = zlib.crc32(changed[start : end - 4]).to_bytes(4, "little")
    return bytes(changed)


@pytest.mark.parametrize(("size", "status"), [(26, 200), (27, 400), (30, 400)])
def test_an_xz_that_asks_for_much_memory_is_refused(
    client: httpx.Client, adapter_folders: dict[str, Path], size: int, status: int
) -> None:
    """`xz -9` asks for 2 to the power of 26 bytes; a file may ask for all memory."""
    whole = tar_of(read_adapter(adapter_folders["mlp"]), "w:xz")
    packed = saying_that_it_needs(whole, size)
    response = client.post(f"{ADAPTERS}?dry_run=1", files={"archive": packed})
    assert response.status_code == status, response.text
    if status == 400:
        assert "emory usage limit" in problem_of(response)


@pytest.fixture
def _names_are_free_again(server: RunningServer) -> Iterator[None]:
    yield
    forget_uploads(server)


@pytest.mark.usefixtures("_names_are_free_again")
@pytest.mark.parametrize("kind", ["zip", "stored", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_damage_anywhere_is_an_answer_and_never_a_failure(
    client: httpx.Client, server: RunningServer, adapter_folders: dict[str, Path], kind: str
) -> None:
    files = read_adapter(adapter_folders["mlp"]) | {"README.md": b"# Mine" * 100}
    kinds: dict[str, TarKind] = {"tar": "w", "tar.gz": "w:gz", "tar.bz2": "w:bz2", "tar.xz": "w:xz"}
    if kind in kinds:
        whole = tar_of(files, kinds[kind])
    else:
        whole = zip_of(files, zipfile.ZIP_STORED if kind == "stored" else zipfile.ZIP_DEFLATED)
    chance = random.Random(kind)
    before = on_disk(server)

    for _ in range(60):
        damaged = bytearray(whole)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(damaged)) :]
        else:
            # Headers lie at the front and, of a zip, at the back.
            place = chance.choice([chance.randrange(500), -1 - chance.randrange(300)])
            damaged[place] = chance.choice([0, 255, chance.randrange(256)])
        response = client.post(f"{ADAPTERS}?dry_run=1", files={"archive": bytes(damaged)})
        assert response.status_code in (200, 400, 413), (bytes(damaged), response.text)

    assert on_disk(server) == before
