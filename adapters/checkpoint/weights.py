"""The tensors of a weights file: all in memory, or none of them while it is only checked."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from infuse.adapters.checkpoint.adapter_files import CONVERT
from infuse.adapters.checkpoint.config import WEIGHTS_FILE
from infuse.adapters.errors import Fault, InvalidAdapter

SUFFIX = ".ia3_l"
"""How the keys of vectors end."""
_MAX_HEADER_BYTES = 4 << 20
"""The longest header of an upload's weights file; a tensor takes about 100 bytes of it."""
_UNREADABLE = (SafetensorError, KeyError, ValueError, RuntimeError)
"""What safetensors raises for a malformed file."""
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Dtypes that an adapter's tensors may have."""
_PIECE = 1 << 18
"""How many values of a tensor are read at once."""
_MAPPED = 1 << 22
"""How many bytes are read before the file is opened again: they stay in memory until then."""


class StagedTensors(Mapping[str, torch.Tensor]):
    """A safetensors file's tensors by their keys, on the meta device: they have shapes and dtypes,
    and `pieces` reads their values. An upload may claim that a tensor takes gigabytes.

    For one thread, and as long as the file is there.
    """

    def __init__(self, path: Path, named: Callable[[Collection[str]], Mapping[str, str]]) -> None:
        """Read the header alone. `named` returns the names of the file's keys here.

        Raises what `safe_open` raises for a damaged file.
        """
        self._path = path
        self._file = safe_open(path, framework="pt")
        self._bytes_read = 0
        """How many bytes were read since the file was opened."""
        self._keys = named(self._file.keys())  # type: ignore[no-untyped-call]
        self._tensors = {
            key: torch.empty_like(self._find(key), device="meta") for key in self._keys
        }

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def pieces(self, key: str) -> Iterator[torch.Tensor]:
        """Yield the values of a tensor in the file's order, `[values]`, a few at a time."""
        for start in range(0, self._tensors[key].numel(), _PIECE):
            if self._bytes_read > _MAPPED:
                self._file = safe_open(self._path, framework="pt")
                self._bytes_read = 0
            piece = self._find(key).flatten()[start : start + _PIECE]
            self._bytes_read += piece.nbytes
            yield piece

    def _find(self, key: str) -> torch.Tensor:
        """Return a view of the file; its values are read when they are used."""
        tensor: torch.Tensor = self._file.get_tensor(self._keys[key])  # type: ignore[no-untyped-call]
        return tensor


def pieces_of(tensors: Mapping[str, torch.Tensor], key: str) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor, `[values]`, a few at a time, whether it is in memory or not."""
    if isinstance(tensors, StagedTensors):
        yield from tensors.pieces(key)
    else:
        yield from torch.split(tensors[key].detach().flatten(), _PIECE)


def parse_weights(data: bytes) -> dict[str, torch.Tensor]:
    """Parse a weights file; the keys are those of `save_pretrained`. Raises InvalidAdapter."""
    try:
        tensors = load(data)
    except _UNREADABLE as error:
        raise _unreadable(data, error) from None
    return {plain: tensors[key] for plain, key in _without_name(tensors).items()}


def stage_weights(path: Path) -> StagedTensors:
    """Open an upload's weights file for its check. Raises InvalidAdapter."""
    with path.open("rb") as file:
        start = file.read(8)
    header = int.from_bytes(start, "little")
    if _MAX_HEADER_BYTES < header <= path.stat().st_size:
        problem = f"says that its list of tensors takes {header} bytes"
        raise InvalidAdapter([Fault(WEIGHTS_FILE, problem, "upload the adapter's tensors alone")])
    try:
        return StagedTensors(path, _without_name)
    except _UNREADABLE as error:
        raise _unreadable(start, error) from None


def _unreadable(start: bytes, error: Exception) -> InvalidAdapter:
    # Looked at only here: a valid file whose header has 640 bytes also begins like a pickle.
    if start[:2] == b"PK" or start[:1] == b"\x80":
        problem = "holds pickled weights, which can run code"
        return InvalidAdapter([Fault(WEIGHTS_FILE, problem, CONVERT)])
    fix = "upload the file whole, as PEFT's save_pretrained wrote it"
    problem = f"is no safetensors file, or is damaged: {error}"
    return InvalidAdapter([Fault(WEIGHTS_FILE, problem, fix)])


def _without_name(keys: Collection[str]) -> dict[str, str]:
    """Return the keys as `save_pretrained` writes them, each with its key in the file.

    A model's whole state has the adapter's name in its keys, `…ia3_l.default`. PEFT loads such a
    file, and so do we. Raises InvalidAdapter.
    """
    names = {key.rpartition(".")[2] for key in keys if SUFFIX in key}
    if len(names) != 1 or names == {SUFFIX[1:]}:
        return {key: key for key in keys}
    [name] = names
    plain = {
        key.removesuffix(f".{name}") if f"{SUFFIX}.{name}" in key else key: key for key in keys
    }
    renamed = {each.replace(f".modules_to_save.{name}.", "."): key for each, key in plain.items()}
    if len(renamed) < len(keys):
        problem = f"holds a tensor twice, with the adapter's name '{name}' and without it"
        raise InvalidAdapter([Fault(WEIGHTS_FILE, problem, "write it with PEFT's save_pretrained")])
    return renamed
