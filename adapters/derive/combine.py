"""Combine several adapters into a new one.

An adapter's vector `l` changes the base by `d = l - 1`. For a module that an adapter does not
target, `d = 0`; a module that none of the adapters targets stays untouched.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.errors import CannotCombine, CombinedNotFinite

Method = Literal["linear", "product", "task_arithmetic", "ties", "dare_linear", "dare_ties"]
METHODS: tuple[Method, ...] = get_args(Method)
SPARSE: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties")
"""The methods that drop some of the differences, and so read `density`."""

_FAR_FROM_ONE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How adapters are combined, with a weight for each in their order."""

    method: Method
    weights: tuple[float, ...]
    missing: Literal["identity", "zero"] = "identity"
    """What `linear` takes for a module that one of them does not target; zero is PEFT's choice."""
    density: float = 1.0
    """The share of differences that the sparse methods keep, in (0, 1]."""
    seed: int = 0
    """Which differences DARE drops."""

    def __post_init__(self) -> None:
        assert self.method in METHODS
        assert 0 < self.density <= 1
        assert all(math.isfinite(weight) for weight in self.weights)
        assert self.missing == "identity" or self.method == "linear"

    @property
    def warnings(self) -> list[str]:
        """Warnings of weights whose sum is far from 1: `linear` scales the identity by the sum."""
        total = sum(self.weights)
        if self.method == "linear" and abs(total - 1) > _FAR_FROM_ONE:
            return [
                f"the weights sum to {total:g}: 'linear' scales every adapted activation by about "
                "that much; weights that sum to 1, or 'task_arithmetic', leave the base as it is"
            ]
        return []


def combine(adapters: Sequence[AdapterVectors], recipe: Recipe) -> AdapterVectors:
    """Return one adapter made of several, at least one, with a weight for each.

    Raises CombinedNotFinite where a vector of the result is not finite in float32, and
    CannotCombine where an adapter brings whole modules.
    """
    assert len(adapters) == len(recipe.weights) > 0
    for adapter in adapters:
        for module in adapter.saved:
            raise CannotCombine(module)
    mix = _MIXES[recipe.method]
    generator = torch.Generator().manual_seed(recipe.seed)
    vectors = {}
    for target in sorted({target for adapter in adapters for target in adapter.vectors}):
        vector = mix([adapter.vectors.get(target) for adapter in adapters], recipe, generator)
        if not bool(torch.isfinite(vector).all()):
            raise CombinedNotFinite(target.module)
        vectors[target] = vector
    return AdapterVectors(vectors)


def mix(adapters: Sequence[AdapterVectors], recipe: Recipe) -> AdapterVectors:
    """`combine`, except that one adapter with weight 1 is returned unchanged, and so may bring
    whole modules."""
    return adapters[0] if recipe.weights == (1.0,) else combine(adapters, recipe)


Vectors = Sequence[torch.Tensor | None]
"""Each adapter's float32 vector of one target; None where it has none."""


def _linear(vectors: Vectors, recipe: Recipe, _: torch.Generator) -> torch.Tensor:
    """`sum(w_i * l_i)`: PEFT's `IA3Model.add_weighted_adapter`, in its order and precision."""
    total = torch.zeros_like(_first(vectors))
    for vector, weight in zip(vectors, recipe.weights, strict=True):
        if vector is not None:
            total += vector * weight
        elif recipe.missing == "identity":
            total += weight
    return total


def _product(vectors: Vectors, recipe: Recipe, _: torch.Generator) -> torch.Tensor:
    """`prod(1 + w_i * d_i)`; with weights of 1 what PEFT does with several active adapters."""
    result = torch.ones_like(_first(vectors), dtype=torch.float64)
    for vector, weight in zip(vectors, recipe.weights, strict=True):
        if vector is not None:
            result *= 1 + weight * _difference(vector)
    return result.float()


def _task_arithmetic(vectors: Vectors, recipe: Recipe, _: torch.Generator) -> torch.Tensor:
    """`1 + sum(w_i * d_i)` (Ilharco et al., Editing Models with Task Arithmetic, 2023)."""
    differences = _differences(vectors)
    return _one_plus((_column(recipe.weights) * differences).sum(dim=0))


def _ties(vectors: Vectors, recipe: Recipe, _: torch.Generator) -> torch.Tensor:
    """TIES-Merging (Yadav et al., 2023), as PEFT's `merge_utils.ties`: trim, elect, merge."""
    differences = _differences(vectors)
    kept = torch.stack([_largest(row, recipe.density) for row in differences])
    return _one_plus(_disjoint_mean(kept, recipe.weights))


def _dare_linear(vectors: Vectors, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """DARE (Yu et al., Language Models are Super Mario, 2024): PEFT's `merge_utils.dare_linear`."""
    kept = _dropped(_differences(vectors), recipe.density, generator)
    return _one_plus((_column(recipe.weights) * kept).sum(dim=0))


def _dare_ties(vectors: Vectors, recipe: Recipe, generator: torch.Generator) -> torch.Tensor:
    """DARE's drop, then TIES' election: PEFT's `merge_utils.dare_ties`."""
    kept = _dropped(_differences(vectors), recipe.density, generator)
    return _one_plus(_disjoint_mean(kept, recipe.weights))


_MIXES: dict[Method, Callable[[Vectors, Recipe, torch.Generator], torch.Tensor]] = {
    "linear": _linear,
    "product": _product,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
}


def _first(vectors: Vectors) -> torch.Tensor:
    return next(vector for vector in vectors if vector is not None)


def _difference(vector: torch.Tensor) -> torch.Tensor:
    """Return `d` in float64, in which `1 + d` is exactly the float32 vector again."""
    return vector.double() - 1


def _differences(vectors: Vectors) -> torch.Tensor:
    """Return the differences of all adapters, `[adapters, size]`."""
    nothing = torch.zeros_like(_first(vectors), dtype=torch.float64)
    return torch.stack([nothing if v is None else _difference(v) for v in vectors])


def _one_plus(difference: torch.Tensor) -> torch.Tensor:
    return (1 + difference).float()


def _column(weights: Sequence[float]) -> torch.Tensor:
    return torch.tensor(weights, dtype=torch.float64)[:, None]


def _largest(difference: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the largest values, a share of `density`; the others become 0."""
    index = difference.abs().topk(int(density * len(difference))).indices
    return torch.zeros_like(difference).index_copy(0, index, difference[index])


def _dropped(differences: torch.Tensor, density: float, generator: torch.Generator) -> torch.Tensor:
    """Keep each difference with probability `density`, divided by it, so that the mean stays."""
    kept = torch.bernoulli(torch.full_like(differences, density), generator=generator)
    return differences * kept / density


def _disjoint_mean(differences: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return, for each value, the mean over the adapters whose sign is that of the sum."""
    elected = torch.where(differences.sum(dim=0) >= 0, 1.0, -1.0)
    agree = differences.sign() == elected
    total = (_column(weights) * differences * agree).sum(dim=0)
    return total / agree.sum(dim=0).clamp(min=1)
