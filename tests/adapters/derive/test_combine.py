"""Combining adapters: PEFT's results where PEFT has the method, and the laws of each."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model
from peft.utils import merge_utils
from transformers import PreTrainedModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors, product
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.derive.combine import METHODS, CombinedNotFinite, Recipe, combine
from tests.factories import tiny_llama

SIZE = 12
PLACES = [
    Target("a", Side.OUTPUT),
    Target("a", Side.INPUT),
    Target("b", Side.OUTPUT),
    Target("c", Side.INPUT),
]
values = st.floats(-3, 3, width=16)
vectors = st.lists(values, min_size=SIZE, max_size=SIZE).map(torch.tensor)
adapters = st.dictionaries(st.sampled_from(PLACES), vectors, min_size=1).map(AdapterVectors)
weights = st.floats(-2, 2)
recipes = st.sampled_from(METHODS).map(lambda method: Recipe(method=method, weights=(1.0,)))


def equal(first: AdapterVectors, second: AdapterVectors) -> bool:
    """Whether vectors are equal bit for bit; a missing one counts as ones."""
    places = {*first.vectors, *second.vectors}
    ones = torch.ones(SIZE)
    return all(torch.equal(first.vectors.get(p, ones), second.vectors.get(p, ones)) for p in places)


def close(first: AdapterVectors, second: AdapterVectors) -> None:
    assert first.vectors.keys() == second.vectors.keys()
    for place, vector in first.vectors.items():
        torch.testing.assert_close(vector, second.vectors[place], rtol=1e-5, atol=1e-5)


# PEFT's results.


def peft_vectors(model: object, name: str) -> dict[str, torch.Tensor]:
    return {
        key.removesuffix(f".ia3_l.{name}"): parameter.detach().flatten()
        for key, parameter in model.named_parameters()  # type: ignore[attr-defined]
        if key.endswith(f".ia3_l.{name}")
    }


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_llama()


def test_linear_with_missing_zero_is_pefts_add_weighted_adapter(base: PreTrainedModel) -> None:
    """The sums are equal bit for bit, also with adapters whose targets differ."""
    model = get_peft_model(
        base, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    )
    model.add_adapter("b", IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))
    for key, parameter in model.named_parameters():
        if "ia3_l" in key:
            parameter.data = 1 + 0.5 * torch.randn_like(parameter)
    model.base_model.add_weighted_adapter(["default", "b"], [0.7, 0.6], "mixed")
    wanted = peft_vectors(model, "mixed")
    both = [
        AdapterVectors({Target(k, Side.OUTPUT): v for k, v in peft_vectors(model, name).items()})
        for name in ("default", "b")
    ]
    model.unload()

    found = combine(both, Recipe(method="linear", weights=(0.7, 0.6), missing="zero")).vectors
    assert {target.module for target in found} == set(wanted)
    assert all(torch.equal(vector, wanted[target.module]) for target, vector in found.items())


@given(st.lists(st.tuples(vectors, weights), min_size=1, max_size=4), st.floats(0.1, 1))
def test_ties_is_pefts_on_the_difference_from_one(
    several: Sequence[tuple[torch.Tensor, float]], density: float
) -> None:
    place = PLACES[0]
    differences = [vector.double() - 1 for vector, _ in several]
    factors = torch.tensor([weight for _, weight in several], dtype=torch.float64)
    wanted = 1 + merge_utils.ties(differences, factors, density)
    recipe = Recipe(method="ties", weights=tuple(w for _, w in several), density=density)

    found = combine([AdapterVectors({place: vector}) for vector, _ in several], recipe)
    torch.testing.assert_close(found.vectors[place], wanted.float())


@given(vectors, st.integers(0, 99), st.floats(0.1, 1))
def test_dare_drops_or_makes_up_for_what_it_drops(
    vector: torch.Tensor, seed: int, density: float
) -> None:
    place = PLACES[0]
    recipe = Recipe(method="dare_linear", weights=(1.0,), density=density, seed=seed)
    found = combine([AdapterVectors({place: vector})], recipe).vectors[place].double() - 1
    kept = (vector.double() - 1) / density

    close_to_kept = torch.isclose(found, kept, atol=1e-5)
    assert (close_to_kept | (found.abs() < 1e-6)).all()


def test_dare_keeps_the_mean() -> None:
    """The mean over many seeds is that of PEFT's `merge_utils.dare_linear`."""
    vector = AdapterVectors({PLACES[0]: torch.linspace(0.2, 1.8, SIZE)})
    drawn = [
        combine([vector], Recipe(method="dare_linear", weights=(1.0,), density=0.5, seed=seed))
        for seed in range(800)
    ]
    mean = torch.stack([each.vectors[PLACES[0]] for each in drawn]).mean(dim=0)
    assert (mean - vector.vectors[PLACES[0]]).abs().max() < 0.12


# Laws.


@given(adapters, recipes)
def test_one_adapter_with_weight_one_is_itself_by_every_method(
    adapter: AdapterVectors, recipe: Recipe
) -> None:
    assert equal(combine([adapter], recipe), adapter)


@given(adapters, adapters, weights, weights, st.sampled_from(METHODS))
def test_the_order_does_not_matter(
    a: AdapterVectors, b: AdapterVectors, v: float, w: float, method: str
) -> None:
    if method.startswith("dare"):
        return
    close(
        combine([a, b], Recipe(method=method, weights=(v, w))),  # type: ignore[arg-type]
        combine([b, a], Recipe(method=method, weights=(w, v))),  # type: ignore[arg-type]
    )


@given(adapters, st.sampled_from(["product", "task_arithmetic"]))
def test_the_base_is_neutral(adapter: AdapterVectors, method: str) -> None:
    base = AdapterVectors({})
    recipe = Recipe(method=method, weights=(1.0, 1.0))  # type: ignore[arg-type]

    assert equal(combine([adapter, base], recipe), adapter)


@given(adapters, adapters)
def test_product_with_weights_of_one_is_the_product_of_active_adapters(
    a: AdapterVectors, b: AdapterVectors
) -> None:
    close(combine([a, b], Recipe(method="product", weights=(1.0, 1.0))), product([a, b]))


@given(adapters, st.sampled_from(["product", "task_arithmetic", "ties", "dare_linear"]))
def test_weight_zero_is_the_base(adapter: AdapterVectors, method: str) -> None:
    recipe = Recipe(method=method, weights=(0.0,))  # type: ignore[arg-type]

    assert equal(combine([adapter], recipe), AdapterVectors({}))


def strengthened(adapter: AdapterVectors, strength: float) -> AdapterVectors:
    """The registry leases this for a request with `strength`."""
    return combine([adapter], Recipe(method="product", weights=(strength,)))


@given(adapters, weights)
def test_strength_runs_from_the_base_through_the_adapter(
    adapter: AdapterVectors, strength: float
) -> None:
    assert equal(strengthened(adapter, 0.0), AdapterVectors({}))
    assert equal(strengthened(adapter, 1.0), adapter)
    for place, vector in strengthened(adapter, strength).vectors.items():
        torch.testing.assert_close(vector, 1 + strength * (adapter.vectors[place] - 1))


@given(adapters, adapters)
def test_linear_with_missing_identity_leaves_the_mean_of_adapters_that_share_nothing_near_one(
    a: AdapterVectors, b: AdapterVectors
) -> None:
    mixed = combine([a, b], Recipe(method="linear", weights=(0.5, 0.5)))
    for place in a.vectors.keys() - b.vectors.keys():
        torch.testing.assert_close(mixed.vectors[place], (a.vectors[place] + 1) / 2)


@given(adapters, adapters, st.sampled_from(METHODS), st.floats(0.1, 1), st.integers(0, 9))
def test_a_recipe_gives_the_same_adapter_every_time(
    a: AdapterVectors, b: AdapterVectors, method: str, density: float, seed: int
) -> None:
    recipe = Recipe(method=method, weights=(0.5, 0.5), density=density, seed=seed)  # type: ignore[arg-type]

    assert combine([a, b], recipe).digest == combine([a, b], recipe).digest


def test_both_sides_of_one_module_stay_apart() -> None:
    out = AdapterVectors({PLACES[0]: torch.full((SIZE,), 2.0)})
    into = AdapterVectors({PLACES[1]: torch.full((SIZE,), 3.0)})
    mixed = combine([out, into], Recipe(method="product", weights=(1.0, 1.0))).vectors

    assert mixed[PLACES[0]].tolist() == [2.0] * SIZE
    assert mixed[PLACES[1]].tolist() == [3.0] * SIZE


def test_a_result_that_is_not_finite_is_refused() -> None:
    huge = AdapterVectors({PLACES[0]: torch.full((SIZE,), 3e38)})
    with pytest.raises(CombinedNotFinite, match="a is not finite"):
        combine([huge, huge], Recipe(method="linear", weights=(2.0, 2.0)))


@pytest.mark.parametrize(
    ("method", "weights", "warned"),
    [
        ("linear", (0.5, 0.5), False),
        ("linear", (1.0, 1.0), True),
        ("linear", (0.1,), True),
        ("task_arithmetic", (1.0, 1.0), False),
    ],
)
def test_linear_weights_that_do_not_sum_to_one_are_warned_about(
    method: str, weights: tuple[float, ...], warned: bool
) -> None:
    assert bool(Recipe(method=method, weights=weights).warnings) == warned  # type: ignore[arg-type]
