"""Find an adapter's files in a folder or an archive, and say what is missing.

The command line uses this too, so it does not import torch.
"""

from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.errors import Fault, InvalidAdapter

PICKLED_FILE = "adapter_model.bin"
CONVERT = (
    "convert it where you trust it: PeftModel.from_pretrained(base, folder)"
    ".save_pretrained(new_folder, safe_serialization=True)"
)
PICKLED = Fault(WEIGHTS_FILE, f"{PICKLED_FILE} is pickled, which can run code", CONVERT)
"""The fault of a folder that has no other weights."""
_SHOWN = 5
_DEEPER = (2, 3)
"""How many folders further down an adapter is looked for, to name it."""


def adapter_folder(files: Iterable[PurePosixPath]) -> PurePosixPath | None:
    """Return the adapter's folder among these files, or None where no file is a config.

    PEFT's `save_pretrained` writes `default` to the folder itself, and other adapters to a folder
    of their name in it. Raises InvalidAdapter where several configs lie equally deep.
    """
    folders = [file.parent for file in files if file.name == CONFIG_FILE]
    if not folders:
        return None
    top = min(len(folder.parts) for folder in folders)
    found = sorted({str(folder) for folder in folders if len(folder.parts) == top})
    if len(found) > 1:
        names = ", ".join(found[:_SHOWN]) + (", …" if len(found) > _SHOWN else "")
        problem = f"lies in {len(found)} folders: {names}"
        raise InvalidAdapter([Fault(CONFIG_FILE, problem, "name or pack one of them")])
    return PurePosixPath(found[0])


def folder_with_adapter(folder: Path) -> Path:
    """Return the folder itself, or the one in it that has an adapter. Raises InvalidAdapter."""
    if not folder.is_dir():
        fix = "name a folder that save_pretrained wrote, or download one: hf download <repository>"
        raise InvalidAdapter([Fault(str(folder), "is no folder on this machine", fix)])
    if (folder / CONFIG_FILE).exists():
        return folder
    below = [PurePosixPath(p.relative_to(folder)) for p in folder.glob(f"*/{CONFIG_FILE}")]
    found = adapter_folder(below)
    if found is None and (deeper := _deeper(folder)):
        fix = f"name {deeper}"
        raise InvalidAdapter([Fault(CONFIG_FILE, f"is not in {folder}, but further down", fix)])
    return folder / (found or "")


def _deeper(folder: Path) -> Path | None:
    """Return a folder further down that has an adapter, such as one that a trainer wrote."""
    for depth in _DEEPER:
        for config in sorted(folder.glob("*/" * depth + CONFIG_FILE)):
            return config.parent
    return None


def missing_files(names: Collection[str]) -> list[Fault]:
    """Return a fault for each file that an adapter's folder with these files lacks."""
    faults = []
    fix = "PEFT's save_pretrained writes it; upload both files"
    if CONFIG_FILE not in names:
        faults.append(Fault(CONFIG_FILE, "is missing", fix))
    if WEIGHTS_FILE not in names:
        pickled = PICKLED_FILE in names
        faults.append(PICKLED if pickled else Fault(WEIGHTS_FILE, "is missing", fix))
    return faults
