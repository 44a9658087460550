"""An upload's files, from form fields or an archive, into a staging folder: nothing else."""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from adapters.checkpoint import WEIGHTS_FILE
from adapters.config import CONFIG_FILE
from adapters.errors import Fault, InvalidAdapter
from server.errors import ApiError

_WANTED = {CONFIG_FILE, WEIGHTS_FILE, "README.md"}
_PICKLED = "adapter_model.bin"
_MAX_ENTRIES = 1000
_ZIP_MAGIC = b"PK"


def save_files(config: IO[bytes], weights: IO[bytes], folder: Path, limit: int) -> None:
    """The two files as they come. `limit` is in bytes, for both. Raises ApiError 413."""
    left = limit
    for name, source in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        left -= _copy(source, folder / name, left, limit)


def unpack(archive: IO[bytes], folder: Path, limit: int) -> None:
    """A zip or tar (plain, gzip, bzip2, xz) with the adapter at its top or in one folder.

    Only the adapter's own files are written, under fixed names, so no entry can climb out; what
    unpacks to more than `limit` bytes is cut off while it is read, whatever its header says.
    Raises InvalidAdapter with all faults, and ApiError 413.
    """
    magic = archive.read(2)
    archive.seek(0)
    try:
        entries = _zip_entries if magic == _ZIP_MAGIC else _tar_entries
        with entries(archive) as files:
            _check([path for path, _ in files])
            left = limit
            for path, opener in files:
                if path.name in _WANTED:
                    with opener as source:
                        left -= _copy(source, folder / path.name, left, limit)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fix = "send a zip, tar, tar.gz, tar.bz2 or tar.xz of the adapter's folder"
        raise InvalidAdapter([Fault("archive", f"cannot be read: {error}", fix)]) from None


class _Opener:
    """One entry, opened when it is its turn."""

    def __init__(self, open_entry: "zipfile.ZipFile | tarfile.TarFile", entry: object) -> None:
        self._archive = open_entry
        self._entry = entry

    def __enter__(self) -> IO[bytes]:
        if isinstance(self._archive, zipfile.ZipFile):
            assert isinstance(self._entry, zipfile.ZipInfo)
            self._file: IO[bytes] = self._archive.open(self._entry)
        else:
            assert isinstance(self._entry, tarfile.TarInfo)
            file = self._archive.extractfile(self._entry)
            assert file is not None, "only regular files come here"
            self._file = file
        return self._file

    def __exit__(self, *_: object) -> None:
        self._file.close()


_Entries = list[tuple[PurePosixPath, _Opener]]


@contextmanager
def _zip_entries(archive: IO[bytes]) -> Iterator[_Entries]:
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        _check_count(len(infos))
        files: _Entries = []
        for info in infos:
            mode = info.external_attr >> 16
            if stat.S_ISLNK(mode):
                raise _climbing(info.filename, "is a link")
            if info.flag_bits & 1:
                raise InvalidAdapter(
                    [Fault("archive", f"{info.filename!r} is encrypted", "send it without one")]
                )
            if not info.is_dir():
                files.append((PurePosixPath(info.filename), _Opener(opened, info)))
        yield files


@contextmanager
def _tar_entries(archive: IO[bytes]) -> Iterator[_Entries]:
    with tarfile.open(fileobj=archive, mode="r:*") as opened:
        files: _Entries = []
        for number, info in enumerate(opened, start=1):
            _check_count(number)
            if info.isdir():
                continue
            if not info.isreg():
                raise _climbing(info.name, "is a link or a device")
            files.append((PurePosixPath(info.name), _Opener(opened, info)))
        yield files


def _check_count(count: int) -> None:
    if count > _MAX_ENTRIES:
        problem = f"has more than {_MAX_ENTRIES} entries"
        raise InvalidAdapter([Fault("archive", problem, "send the adapter's folder alone")])


def _check(paths: list[PurePosixPath]) -> None:
    for path in paths:
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise _climbing(str(path), "leads out of the archive")
    faults = []
    names = [path.name for path in paths]
    if _PICKLED in names and WEIGHTS_FILE not in names:
        fix = "PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        faults.append(Fault(_PICKLED, "is pickled, which can run code", f"convert it: {fix}"))
    for wanted in sorted(_WANTED):
        if names.count(wanted) > 1:
            fix = "send one adapter in one archive"
            faults.append(Fault("archive", f"holds {wanted} more than once", fix))
    if {CONFIG_FILE, WEIGHTS_FILE} <= set(names):
        folders = {path.parent for path in paths if path.name in (CONFIG_FILE, WEIGHTS_FILE)}
        if len(folders) > 1:
            fix = "pack the folder that PEFT saved"
            faults.append(Fault("archive", "holds the two files in different folders", fix))
    if faults:
        raise InvalidAdapter(faults)


def _climbing(name: str, why: str) -> InvalidAdapter:
    return InvalidAdapter([Fault("archive", f"{name[:200]!r} {why}", "pack plain files only")])


def _copy(source: IO[bytes], target: Path, left: int, limit: int) -> int:
    """Copy at most `left` bytes; returns how many."""
    copied = 0
    with target.open("xb") as file:
        while chunk := source.read(min(1 << 20, left - copied + 1)):
            copied += len(chunk)
            if copied > left:
                raise ApiError(
                    413,
                    f"The adapter's files are larger than this server's limit of {limit} bytes.",
                    code="upload_too_large",
                )
            file.write(chunk)
    return copied
