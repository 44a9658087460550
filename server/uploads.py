"""Writes an upload's files, which come as two files or as an archive, to a folder."""

import bz2
import errno
import gzip
import io
import lzma
import stat
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, cast

from infuse.adapters.checkpoint.adapter_files import adapter_folder, missing_files
from infuse.adapters.checkpoint.config import CONFIG_FILE, FILES, WEIGHTS_FILE
from infuse.adapters.errors import Fault, InvalidAdapter
from infuse.server.errors import RETRY_SOON, ApiError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_MAX_ENTRIES = 1000
_MAX_READ = 1 << 20
"""The most bytes that are read at once. Parsers would read as many as a header names."""
_TAR_ROOM = 4 << 20
"""Bytes of headers and padding around a tar's files."""
_MAX_HEADERS = 2 << 20
"""Bytes that describe a tar's files, such as the holes of sparse ones: they become objects."""
_MAX_COMMON = 64
"""Headers of a tar that hold for all files after them: each file gets a copy."""
_ZIP_MAGICS = (b"PK\3\4", b"PK\5\6")
_XZ_MEMORY = 70 << 20
"""Bytes that unpacking xz may take: an archive says itself how many, and `xz -9` needs 65 MiB."""
_XZ_CHUNK = 1 << 16


class _Xz(io.RawIOBase):
    """What an xz file unpacks to, within _XZ_MEMORY: `lzma.open` has no limit. One stream only."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rewind()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        data = b""
        while not data and not self._unpacking.eof:
            packed = self._file.read(_XZ_CHUNK) if self._unpacking.needs_input else b""
            if self._unpacking.needs_input and not packed:
                raise EOFError("it ends before its end")
            data = self._unpacking.decompress(packed, len(view))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go forward by unpacking; going back unpacks from the start. The end is not known."""
        if whence == io.SEEK_CUR:
            offset += self._position
        if offset < self._position:
            self._rewind()
        while self._position < offset and self.read(min(_MAX_READ, offset - self._position)):
            pass
        return self._position

    def _rewind(self) -> None:
        self._file.seek(0)
        self._unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
        self._position = 0


_DECOMPRESSORS: dict[bytes, Callable[[IO[bytes]], object]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lambda file: io.BufferedReader(_Xz(file)),
}


Take = Callable[[int], object]
"""Is told how many bytes are about to be written; raises where there is no room for them."""


class UploadBudget:
    """The bytes that all uploads in progress take together, on the disk and in temporary files.
    Thread-safe.

    An upload that finds no room is refused. Made to wait, it would hold its connection and all that
    it has sent.
    """

    def __init__(self, total: int, of_tenant: int) -> None:
        """`of_tenant`: how many of the `total` bytes the uploads of one tenant may take."""
        self._left = total
        self._of_tenant = of_tenant
        self._taken: Counter[str] = Counter()
        """Tenant -> the bytes that its uploads take."""
        self._mutex = threading.Lock()

    @contextmanager
    def share(self, tenant: str | None = None) -> Iterator[Take]:
        """Within: takes bytes for one upload, or raises ApiError 503. All are given back. Without a
        tenant, all bytes may be taken."""
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            with self._mutex:
                left = self._left
                if tenant is not None:
                    left = min(left, self._of_tenant - self._taken[tenant])
                if count > left:
                    raise ApiError(
                        503,
                        "Other uploads in progress leave no room for this one; send it again.",
                        code="too_many_uploads",
                        headers=RETRY_SOON,
                    )
                self._left -= count
                taken += count
                if tenant is not None:
                    self._taken[tenant] += count

        try:
            yield take
        finally:
            with self._mutex:
                self._left += taken
                if tenant is not None:
                    self._taken[tenant] -= taken


def save_files(config: IO[bytes], weights: IO[bytes], folder: Path, limit: int, take: Take) -> None:
    """Write the two files as they are. `limit` is in bytes, for both; `take` is told of each piece.
    Raises ApiError 413, and what `take` raises."""
    left = limit
    for name, source in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
        left -= _copy(source, folder / name, left, limit, take)


def unpack(archive: IO[bytes], folder: Path, limit: int, take: Take) -> None:
    """Unpack a zip or tar (plain, gzip, bzip2, xz) with the adapter at its top or in a folder.

    Only the adapter's own files are written, under fixed names, so no entry can climb out; what
    unpacks to more than `limit` bytes is cut off while it is read, whatever its header says.
    `take` is told of each piece. Raises InvalidAdapter with all faults, ApiError 413, and what
    `take` raises.
    """
    try:
        with _entries(archive, limit) as files:
            where = _folder([path for path, _ in files])
            left = limit
            for path, opener in files:
                if path.parent == where and path.name in FILES:
                    with opener as source:
                        left -= _copy(source, folder / path.name, left, limit, take)
    except (InvalidAdapter, ApiError):
        raise
    except Exception as error:
        # The libraries promise no set of errors for damaged archives: zlib.error, ValueError for a
        # negative offset, IndexError for an empty name, ... Only the disk's own are not about it.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        fix = "send a zip, tar, tar.gz, tar.bz2 or tar.xz of the adapter's folder"
        raise InvalidAdapter([Fault("archive", f"cannot be read: {error}", fix)]) from None


class _Bounded:
    """The file that an archive's parser reads: at most _MAX_READ bytes at once, none past `end`,
    and no more than _MAX_HEADERS together while it lists a tar's files.

    A tar is read through its decompressor, so what is skipped in it costs time as well.
    """

    def __init__(self, file: IO[bytes], end: int | None = None) -> None:
        self._file = file
        self._end = end
        self.left: int | None = None
        """The bytes that may still be read. None: any."""
        self.tell = file.tell
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_READ:
            raise _too_much(f"says that a part of its directory takes {size} bytes")
        self._check_end(self._file.tell() + size)
        data = self._file.read(size)
        if self.left is not None:
            self.left -= len(data)
            if self.left < 0:
                raise _too_much(f"has more than {_MAX_HEADERS} bytes of headers")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            self._check_end(offset)
        return self._file.seek(offset, whence)

    def _check_end(self, position: int) -> None:
        if self._end is not None and position > self._end:
            raise _too_large(self._end - _TAR_ROOM)


class _Opener:
    """Opens one entry of an archive, when it is copied."""

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
def _entries(archive: IO[bytes], limit: int) -> Iterator[_Entries]:
    start = archive.read(8)
    archive.seek(0)
    if start.startswith(_ZIP_MAGICS):
        with _zip_entries(_Bounded(archive)) as files:
            yield files
        return
    for magic, decompress in _DECOMPRESSORS.items():
        if start.startswith(magic):
            archive = cast(IO[bytes], decompress(archive))
    with _tar_entries(_Bounded(archive, end=limit + _TAR_ROOM)) as files:
        yield files


@contextmanager
def _zip_entries(archive: _Bounded) -> Iterator[_Entries]:
    with zipfile.ZipFile(cast(IO[bytes], archive)) as opened:
        infos = opened.infolist()
        _check_count(len(infos))
        files: _Entries = []
        for info in infos:
            mode = info.external_attr >> 16
            if stat.S_ISLNK(mode):
                raise _not_allowed(info.filename, "is a link")
            if info.flag_bits & 1:
                raise InvalidAdapter(
                    [Fault("archive", f"{info.filename!r} is encrypted", "pack without a password")]
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # The others are unpacked without a limit by `zipfile`.
                problem = f"{info.filename!r} is not packed by deflate"
                raise InvalidAdapter([Fault("archive", problem, "pack with another program")])
            if not info.is_dir():
                files.append((PurePosixPath(info.filename), _Opener(opened, info)))
        yield files


@contextmanager
def _tar_entries(archive: _Bounded) -> Iterator[_Entries]:
    archive.left = _MAX_HEADERS
    with tarfile.open(fileobj=cast(IO[bytes], archive), mode="r:") as opened:
        files: _Entries = []
        for number, info in enumerate(opened, start=1):
            _check_count(number)
            if len(opened.pax_headers) > _MAX_COMMON:
                raise _too_much(f"has more than {_MAX_COMMON} headers for all files")
            if info.isdir():
                continue
            if not info.isreg():
                raise _not_allowed(info.name, "is a link or a device")
            files.append((PurePosixPath(info.name), _Opener(opened, info)))
        archive.left = None
        yield files


def _check_count(count: int) -> None:
    if count > _MAX_ENTRIES:
        raise _too_much(f"has more than {_MAX_ENTRIES} entries")


def _too_much(problem: str) -> InvalidAdapter:
    return InvalidAdapter([Fault("archive", problem, "send the adapter's folder alone")])


def _folder(paths: list[PurePosixPath]) -> PurePosixPath:
    """The folder of the archive that holds the adapter. Raises InvalidAdapter with all faults."""
    for path in paths:
        if path.is_absolute() or ".." in path.parts or "\\" in str(path):
            raise _not_allowed(str(path), "leads out of the archive")
    where = adapter_folder(paths) or PurePosixPath()
    names = [path.name for path in paths if path.parent == where]
    faults = [
        Fault("archive", f"holds {wanted} more than once", "send one adapter in one archive")
        for wanted in sorted(FILES)
        if names.count(wanted) > 1
    ]
    missing = missing_files(names)
    elsewhere = {path.name for path in paths if path.parent != where}
    if any(fault.field in elsewhere for fault in missing):
        fix = "pack the folder that PEFT saved"
        missing = [Fault("archive", "holds the two files in different folders", fix)]
    if faults + missing:
        raise InvalidAdapter(faults + missing)
    return where


def _not_allowed(name: str, why: str) -> InvalidAdapter:
    return InvalidAdapter([Fault("archive", f"{name[:200]!r} {why}", "pack plain files only")])


def _copy(source: IO[bytes], target: Path, left: int, limit: int, take: Take) -> int:
    """Copy at most `left` bytes; returns how many."""
    copied = 0
    with target.open("xb") as file:
        while chunk := source.read(min(1 << 20, left - copied + 1)):
            copied += len(chunk)
            if copied > left:
                raise _too_large(limit)
            take(len(chunk))
            file.write(chunk)
    return copied


def _too_large(limit: int) -> ApiError:
    message = f"The adapter's files are larger than this server's limit of {limit} bytes."
    return ApiError(413, message, code="upload_too_large")
