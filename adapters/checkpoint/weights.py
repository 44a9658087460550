"""The tensors of a weights file: all in memory, or, while it is only checked, none of them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from adapters.checkpoint.adapter_files import CONVERT
from adapters.checkpoint.config import WEIGHTS_FILE
from adapters.errors import Fault, InvalidAdapter

SUFFIX = ".ia3_l"
"""Of the keys of vectors."""
_MAX_HEADER_BYTES = 4 << 20
"""Of an upload's weights file: a tensor takes about a hundred."""
_UNREADABLE = (SafetensorError, KeyError, ValueError, RuntimeError)
"""What safetensors raises for a file that is none."""
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Dtypes that an adapter's numbers may have: torch computes with them."""
_PIECE = 1 << 18
"""Values of a tensor that are looked at together."""
_MAPPED = 1 << 22
"""Bytes that are looked at before the file is opened again: they stay in memory until then."""


class StagedTensors(Mapping[str, torch.Tensor]):
    """A safetensors file's tensors by their keys, on the meta device: they have shapes and dtypes,
    and `pieces` reads their values. A stranger's file may say that a tensor takes gigabytes.

    For one thread, and as long as the file is there.
    """

    def __init__(self, path: Path, named: Callable[[Collection[str]], Mapping[str, str]]) -> None:
        """Reads the header alone. `named` says of the file's keys what each is called here.

        Raises what `safe_open` raises for a file that is damaged."""
        self._path = path
        self._file = safe_open(path, framework="pt")
        self._looked_at = 0
        """Bytes, since the file was opened."""
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
        """The values of a tensor in the file's order, `[values]`, a few at a time."""
        for start in range(0, self._tensors[key].numel(), _PIECE):
            if self._looked_at > _MAPPED:
                self._file = safe_open(self._path, framework="pt")
                self._looked_at = 0
            piece = self._find(key).flatten()[start : start + _PIECE]
            self._looked_at += piece.nbytes
            yield piece

    def _find(self, key: str) -> torch.Tensor:
        """A view of the file, of which nothing is in memory yet."""
        tensor: torch.Tensor = self._file.get_tensor(self._keys[key])  # type: ignore[no-untyped-call]
        return tensor


def pieces_of(tensors: Mapping[str, torch.Tensor], key: str) -> Iterator[torch.Tensor]:
    """The values of a tensor, `[values]`, a few at a time, whether it is in memory or not."""
    if isinstance(tensors, StagedTensors):
        yield from tensors.pieces(key)
    else:
        yield from torch.split(tensors[key].detach().flatten(), _PIECE)


def parse_weights(data: bytes) -> dict[str, torch.Tensor]:
    """What a weights file holds, by the keys of `save_pretrained`. Raises InvalidAdapter."""
    try:
        tensors = load(data)
    except _UNREADABLE as error:
        raise _unreadable(data, error) from None
    return {plain: tensors[key] for plain, key in _without_name(tensors).items()}


def stage_weights(path: Path) -> StagedTensors:
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
    # Only now: a good file begins like a pickle where its header has, say, 640 bytes.
    if start[:2] == b"PK" or start[:1] == b"\x80":
        problem = "holds pickled weights, which can run code"
        return InvalidAdapter([Fault(WEIGHTS_FILE, problem, CONVERT)])
    fix = "upload the file whole, as PEFT's save_pretrained wrote it"
    problem = f"is no safetensors file, or is damaged: {error}"
    return InvalidAdapter([Fault(WEIGHTS_FILE, problem, fix)])


def _without_name(keys: Collection[str]) -> dict[str, str]:
    """The keys of `save_pretrained`, and those of a file. A model's whole state names the adapter:
    `…ia3_l.default`. PEFT loads it, and so do we. Raises InvalidAdapter."""
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
