"""Summarise an adapter's vectors in numbers: what it amplifies, what it inhibits, and how much.

An adapter's vector `l` changes the base by `d = l - 1`: above 0 it amplifies, below 0 it inhibits.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Target

HISTOGRAM_BINS = 32
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number that is a part of a module's name."""

Floats = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


@dataclass(frozen=True, slots=True)
class VectorSummary:
    """One vector `l` in numbers."""

    target: Target
    size: int
    min: float
    max: float
    mean: float
    norm: float
    """The length of `d`."""
    amplified: float
    """The share of values above 1."""
    inhibited: float
    """The share of values below 1."""
    histogram: tuple[int, ...]
    """How many values lie between each two of the adapter's bounds."""
    columns: tuple[float, ...]
    """The means of `d` over neighbouring features, in their order."""

    @property
    def layer(self) -> int | None:
        """The first number in the module's name; None where it has none."""
        found = _LAYER.search(self.target.module)
        return None if found is None else int(found.group())

    @property
    def kind(self) -> str:
        """The module's name with a star for its layer: the same for all layers."""
        return _LAYER.sub("*", self.target.module, count=1)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    bounds: tuple[float, ...]
    """The histograms' bounds, around 1, which all vectors share."""
    vectors: tuple[VectorSummary, ...]
    """In the order of their layers."""


def summarize(adapter: AdapterVectors, columns: int) -> AdapterSummary:
    """Return an adapter's vectors in numbers, each with `columns` means at most; 0: none."""
    # numpy computes on one core; torch would take several from the model.
    differences = {target: _difference(vector) for target, vector in adapter.vectors.items()}
    reach = max((float(abs(d).max()) for d in differences.values()), default=0.0) or 1.0
    bounds = numpy.linspace(1 - reach, 1 + reach, HISTOGRAM_BINS + 1)
    # The bounds are rounded, and every value lies between the first and the last.
    bounds[[0, -1]] = numpy.nextafter(bounds[[0, -1]], [-numpy.inf, numpy.inf])
    summaries = [_summarize(target, d, bounds, columns) for target, d in differences.items()]
    summaries.sort(key=lambda each: (-1 if each.layer is None else each.layer, each.target))
    return AdapterSummary(tuple(bounds.tolist()), tuple(summaries))


def _summarize(target: Target, d: Floats, bounds: Floats, columns: int) -> VectorSummary:
    counts, _ = numpy.histogram(1 + d, bounds)
    parts = numpy.array_split(d, min(columns, d.size)) if columns else []
    return VectorSummary(
        target=target,
        size=d.size,
        min=float(1 + d.min()),
        max=float(1 + d.max()),
        mean=float(1 + d.mean()),
        norm=float(numpy.linalg.norm(d)),
        amplified=float((d > 0).mean()),
        inhibited=float((d < 0).mean()),
        histogram=tuple(counts.tolist()),
        columns=tuple(float(part.mean()) for part in parts),
    )


def similarity(adapters: Sequence[AdapterVectors]) -> list[list[float | None]]:
    """Return the cosines between what each two adapters change, `[adapters, adapters]`: 1 for the
    same direction, 0 for nothing in common, -1 for the opposite. None: one of them changes nothing.

    A module that an adapter does not target has a `d` of 0.
    """
    differences = [
        {target: _difference(vector) for target, vector in adapter.vectors.items()}
        for adapter in adapters
    ]
    norms = [float(numpy.sqrt(_dot(each, each))) for each in differences]
    return [
        [
            float(numpy.clip(_dot(one, other) / (of_one * of_other), -1, 1))
            if of_one and of_other
            else None
            for other, of_other in zip(differences, norms, strict=True)
        ]
        for one, of_one in zip(differences, norms, strict=True)
    ]


def _dot(one: dict[Target, Floats], other: dict[Target, Floats]) -> float:
    return float(sum(numpy.dot(one[target], other[target]) for target in one.keys() & other.keys()))


def _difference(vector: torch.Tensor) -> Floats:
    """Return `d` in float64, in which `1 + d` is exactly the float32 vector again."""
    return vector.numpy().astype(numpy.float64) - 1
