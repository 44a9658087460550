"""Read adapters quickly that have the same layout as one that was checked before.

Most adapters of a server have the same config and list of tensors. What these mean for the base is
found, and checked, once; the next such adapter is read in one pass over its numbers. The first
request of an adapter waits for this, and the model's thread for the interpreter's lock meanwhile.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, deserialize

from infuse.adapters.checkpoint.checkpoint import (
    AdapterVectors,
    Checkpoint,
    Float32s,
    effective_vectors,
    keys_of_vectors,
    parse_checkpoint,
)
from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.checkpoint.targets import BaseModules, Target, resolve_targets

_KEPT = 64
"""How many layouts are remembered."""

_Tensors = frozenset[tuple[str, str, tuple[int, ...]]]
"""The key, dtype and shape of each tensor."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """The layout of a file that holds nothing but float32 vectors."""

    targets: tuple[Target, ...]
    keys: tuple[str, ...]
    """The keys of the targets' tensors in the file."""
    sizes: list[int]

    def join(self, tensors: Mapping[str, Mapping[str, Any]]) -> Float32s:
        """Join the vectors in the order of the targets."""
        data = bytearray().join(tensors[key]["data"] for key in self.keys)
        return numpy.frombuffer(data, numpy.float32)

    def vectors(self, together: Float32s) -> AdapterVectors:
        parts = torch.split(torch.from_numpy(together), self.sizes)
        return AdapterVectors(dict(zip(self.targets, parts, strict=True)), together=together)


class Layouts:
    """Reads adapters of one base, whose modules are `modules`. Thread-safe."""

    def __init__(self, modules: BaseModules) -> None:
        self._modules = modules
        self._known: dict[tuple[bytes, _Tensors], _Layout] = {}

    def read(self, files: Mapping[str, bytes]) -> AdapterVectors:
        """Return `effective_vectors(parse_checkpoint(files))`. Raises what they raise."""
        config = files[CONFIG_FILE]
        try:
            tensors = dict(deserialize(files[WEIGHTS_FILE]))  # type: ignore[no-untyped-call]
        except SafetensorError:
            return effective_vectors(parse_checkpoint(files), self._modules)
        described = frozenset((k, t["dtype"], tuple(t["shape"])) for k, t in tensors.items())
        layout = self._known.get((config, described))
        if layout is not None:
            together = layout.join(tensors)
            # The sum is finite only if every value is.
            if math.isfinite(together.sum()):
                return layout.vectors(together)
        tensors.clear()
        checkpoint = parse_checkpoint(files)
        vectors = effective_vectors(checkpoint, self._modules)
        if layout is None:
            self._learn(config, described, checkpoint, vectors)
        return vectors

    def _learn(
        self, config: bytes, described: _Tensors, checkpoint: Checkpoint, vectors: AdapterVectors
    ) -> None:
        if vectors.saved or not vectors.vectors:
            return
        if any(dtype != "F32" for _, dtype, _ in described):
            return
        targets = resolve_targets(checkpoint.config, self._modules)
        keys = keys_of_vectors(checkpoint.config, targets)
        if keys.keys() != {key for key, _, _ in described}:
            return  # The keys of the file end in the adapter's name.
        by_target = {target: key for key, target in keys.items()}
        ordered = tuple(sorted(by_target))
        if len(self._known) >= _KEPT:
            self._known.clear()
        self._known[config, described] = _Layout(
            ordered,
            tuple(by_target[target] for target in ordered),
            [self._modules.size(target) for target in ordered],
        )
