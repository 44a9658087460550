"""Adapters packed as users pack them, and as attackers do."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TarKind = Literal["w", "w:gz", "w:bz2", "w:xz"]


def read_adapter(folder: Path) -> dict[str, bytes]:
    """The two files that make an adapter, by name."""
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def form_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The parts of an upload in two files."""
    return {"config": files[CONFIG], "weights": files[WEIGHTS]}


def zip_of(files: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


def tar_of(files: Mapping[str, bytes], kind: TarKind = "w") -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode=kind) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()
