"""The memory that uploads take, in a server of its own process; and the budget of all uploads."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from infuse.server.services import Services
from infuse.server.settings import MEBIBYTE
from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, error_of
from tests.api.test_health import StartServer
from tests.served import address_of

SIZE = 160 * MEBIBYTE
MAY_RISE = SIZE // 2
"""By how much the peak may rise, however many uploads there are."""
COMMAND = "from infuse.server.cli import main; main()"


@pytest.fixture(scope="module")
def process(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """A server's URL and process id."""
    folder = tmp_path_factory.mktemp("server")
    arguments = ["serve", "--port", "0", "--model", model_folder, "--served-model-name", "tiny"]
    arguments += ["--adapters-dir", folder / "store", "--max-upload-bytes", 2 * SIZE]
    log = folder / "log"
    with log.open("w") as output:
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield address_of(server, log), server.pid
    finally:
        server.terminate()
        assert server.wait(60) in (0, -signal.SIGTERM)


def header_of(**tensors: list[int]) -> bytes:
    """The header of a safetensors file with float32 tensors of these shapes."""
    header, start = {}, 0
    for name, shape in tensors.items():
        end = start + 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def archive_of_zeros(files: dict[str, bytes], file: str, start: bytes) -> bytes:
    """An adapter, one file of which is so many zeros after its beginning."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            if name != file:
                archive.writestr(name, data)
        with archive.open(file, "w") as entry:
            entry.write(start)
            for _ in range(SIZE // MEBIBYTE):
                entry.write(bytes(MEBIBYTE))
    return packed.getvalue()


EMBEDDINGS = "base_model.model.model.embed_tokens.weight"
ARCHIVES = {
    "an unknown tensor": (WEIGHTS, header_of(stranger=[SIZE // 32, 8]), 400),
    "grown embeddings": (WEIGHTS, header_of(**{EMBEDDINGS: [SIZE // 128, 32]}), 400),
    "no tensors": (WEIGHTS, b"", 400),
    "a config": (CONFIG, b"", 400),
    "a tokenizer": ("tokenizer.json", b"", 400),
    "a tokenizer's config": ("tokenizer_config.json", b"", 400),
    "a readme": ("README.md", b"", 201),
}

ORDINARY = (("an unknown tensor", 1), ("grown embeddings", 4), ("a config", 1))
"""What is tried each time; the others take as long, in the full tests."""


def memory(pid: int, what: str) -> int:
    """Bytes: VmRSS is what a process has now, VmHWM its peak."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split(f"{what}:")[1].split()[0]) * 1024


@pytest.mark.fault(
    "memory",
    "Uploads unpack to a thousand times their size",
    by="zip archives of zeros",
    promise="They are refused, and take a bounded memory, however many come at once.",
)
@pytest.mark.parametrize(
    ("kind", "at_once"),
    [
        pytest.param(kind, at_once, marks=() if (kind, at_once) in ORDINARY else pytest.mark.full)
        for kind in ARCHIVES
        for at_once in (1, 4)
    ],
)
def test_an_archive_of_zeros_takes_no_more_memory_than_any_other(
    process: tuple[str, int], adapter_folders: dict[str, Path], kind: str, at_once: int
) -> None:
    file, start, status = ARCHIVES[kind]
    files = read_adapter(adapter_folders["mlp"])
    packed = archive_of_zeros(files, file, start)
    assert len(packed) < MEBIBYTE
    answers, risen = add_at_once(process, adapter_folders["mlp"], [packed] * at_once)

    assert [answer.status_code for answer in answers] == [status] * at_once
    assert risen < MAY_RISE, f"{risen / MEBIBYTE:.0f} MiB"


def tar_gz(entries: Iterable[tuple[tarfile.TarInfo, bytes]], common: dict[str, str]) -> bytes:
    """`common`: headers that hold for all files."""
    packed = io.BytesIO()
    form = {"format": tarfile.PAX_FORMAT, "pax_headers": common, "compresslevel": 1}
    with tarfile.open(fileobj=packed, mode="w:gz", **form) as archive:
        for entry, data in entries:
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def of_holes() -> bytes:
    """A file that is a list of eight million holes."""
    entry = tarfile.TarInfo(WEIGHTS)
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    return tar_gz([(entry, b"4000000\n" + b"0\n" * 8_000_000)], {})


def of_common_headers() -> bytes:
    """Empty files, for each of which 50,000 headers hold."""
    entries = [(tarfile.TarInfo(str(number)), b"") for number in range(200)]
    return tar_gz(entries, {str(number): "" for number in range(50_000)})


HEADERS = {
    "holes": (of_holes, "bytes of headers"),
    "headers for all files": (of_common_headers, "headers for all files"),
}


@pytest.mark.parametrize(("made", "problem"), HEADERS.values(), ids=HEADERS)
def test_a_tar_cannot_fill_memory_with_what_it_says_of_its_files(
    process: tuple[str, int],
    adapter_folders: dict[str, Path],
    made: Callable[[], bytes],
    problem: str,
) -> None:
    [answer], risen = add_at_once(process, adapter_folders["mlp"], [made()])

    assert answer.status_code == 400
    assert problem in answer.json()["error"]["message"]
    assert risen < MAY_RISE, f"{risen / MEBIBYTE:.0f} MiB"


def add_at_once(
    process: tuple[str, int], adapter: Path, archives: Sequence[bytes]
) -> tuple[list[httpx.Response], int]:
    """The answers to uploads of archives, all at once, and by how many bytes the peak of the
    server's memory rises meanwhile."""
    url, pid = process
    with httpx.Client(base_url=url, timeout=120) as client:
        assert upload(client, "small", adapter).status_code == 201
        client.delete(f"{ADAPTERS}/small")
        # The peak is counted from here on.
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        before = memory(pid, "VmRSS")
        forms = [{"name": f"packed-{number}"} for number in range(len(archives))]

        def add(form: dict[str, str], packed: bytes) -> httpx.Response:
            return client.post(ADAPTERS, data=form, files={"archive": packed})

        with ThreadPoolExecutor(len(archives)) as threads:
            answers = list(threads.map(add, forms, archives))
        risen = memory(pid, "VmHWM") - before
        for form in forms:
            client.delete(f"{ADAPTERS}/{form['name']}")
    return answers, risen


# The budget of all together


@pytest.fixture
def small(start_server: StartServer) -> tuple[str, Services]:
    """A server whose uploads may take three of the tests' adapters, packed and unpacked."""
    return start_server(max_upload_bytes=MEBIBYTE, max_uploads_bytes=3 * MEBIBYTE)


def test_an_upload_that_finds_no_room_is_503_and_finds_it_later(
    small: tuple[str, Services], adapter_folders: dict[str, Path]
) -> None:
    url, services = small
    with httpx.Client(base_url=url, timeout=60) as client:
        with services.uploads.share() as take:
            take(3 * MEBIBYTE - 1000)
            for answer in (
                upload(client, "new", adapter_folders["mlp"]),
                client.post(
                    f"{ADAPTERS}?dry_run=true",
                    files=form_of(read_adapter(adapter_folders["mlp"])),
                ),
            ):
                error = error_of(answer, 503)
                assert (error["code"], error["type"]) == ("too_many_uploads", "server_error")
                assert int(answer.headers["retry-after"]) > 0
            assert client.get(ADAPTERS).json()["data"] == []
        for name in "abcdef":
            assert upload(client, name, adapter_folders["mlp"]).status_code == 201
        with services.uploads.share() as take:
            take(3 * MEBIBYTE)


def test_what_an_archive_unpacks_to_counts_as_well(
    small: tuple[str, Services], adapter_folders: dict[str, Path]
) -> None:
    url, services = small
    files = read_adapter(adapter_folders["mlp"]) | {"README.md": bytes(500_000)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    with httpx.Client(base_url=url, timeout=60) as client:
        form = {"data": {"name": "new"}, "files": {"archive": packed.getvalue()}}
        with services.uploads.share() as take:
            take(3 * MEBIBYTE - 100_000)
            assert error_of(client.post(ADAPTERS, **form), 503)["code"] == "too_many_uploads"
        assert client.post(ADAPTERS, **form).status_code == 201
        staging = Path(services.settings.adapters_dir) / "staging"
        assert os.listdir(staging) == []


def test_a_body_of_unknown_length_takes_what_it_may_become(
    small: tuple[str, Services], adapter_folders: dict[str, Path]
) -> None:
    url, services = small
    request = httpx.Request("POST", url, files=form_of(read_adapter(adapter_folders["mlp"])))
    body, kind = request.read(), request.headers["content-type"]

    def pieces() -> Iterator[bytes]:
        yield body

    with httpx.Client(base_url=url, timeout=60) as client:
        path, headers = f"{ADAPTERS}?dry_run=true", {"Content-Type": kind}
        with services.uploads.share() as take:
            take(MEBIBYTE + 1)
            assert client.post(path, content=pieces(), headers=headers).status_code == 503
            assert client.post(path, content=body, headers=headers).status_code == 200
        assert client.post(path, content=pieces(), headers=headers).status_code == 200


def test_a_budget_is_never_exceeded_and_is_given_back(small: tuple[str, Services]) -> None:
    _, services = small
    together = threading.Barrier(8)

    def use() -> int:
        together.wait()
        taken = 0
        try:
            with services.uploads.share() as take:
                for _ in range(100):
                    take(MEBIBYTE // 16)
                    taken += 1
        except Exception:
            return taken
        raise AssertionError("eight uploads took twice what there is")

    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(lambda _: use(), range(8)))
    assert max(counts) <= 48
    with services.uploads.share() as take:
        take(3 * MEBIBYTE)
