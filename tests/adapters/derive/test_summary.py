"""Adapters' vectors in numbers, against the vectors of a model that PEFT loaded."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peft import PeftModel

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.checkpoint.targets import Side, Target
from infuse.adapters.derive.summary import AdapterSummary, similarity, summarize
from tests.adapters.oracle import vectors_of
from tests.factories import save_adapter, tiny_llama

COLUMNS = 5
K, V = (Target(f"model.layers.1.self_attn.{name}_proj", Side.OUTPUT) for name in "kv")


class Saved(NamedTuple):
    vectors: AdapterVectors
    summary: AdapterSummary
    peft: dict[str, torch.Tensor]
    """Module -> its vector in PEFT's model, in float64."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    base = tiny_llama()
    folder: Path = save_adapter(base, tmp_path_factory.mktemp("adapter"))
    vectors = vectors_of(folder, base)
    peft = {
        name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"): parameter.detach()
        for name, parameter in PeftModel.from_pretrained(base, folder).named_parameters()
        if ".ia3_l." in name
    }
    flat = {name: parameter.flatten().double() for name, parameter in peft.items()}
    return Saved(vectors, summarize(vectors, COLUMNS), flat)


def adapter(**vectors: list[float]) -> AdapterVectors:
    places = {"k": K, "v": V}
    return AdapterVectors({places[name]: torch.tensor(v) for name, v in vectors.items()})


def test_every_vector_of_peft_s_model_is_told_of(saved: Saved) -> None:
    assert {each.target.module for each in saved.summary.vectors} == saved.peft.keys()


def test_the_numbers_are_those_of_peft_s_vectors(saved: Saved) -> None:
    for each in saved.summary.vectors:
        vector = saved.peft[each.target.module]
        assert each.size == len(vector)
        assert (each.min, each.max) == (vector.min(), vector.max())
        assert each.mean == pytest.approx(float(vector.mean()))
        assert each.norm == pytest.approx(float(torch.dist(vector, torch.ones_like(vector))))
        assert each.amplified == pytest.approx(float((vector > 1).double().mean()))
        assert each.inhibited == pytest.approx(float((vector < 1).double().mean()))


def test_a_histogram_counts_every_value_once(saved: Saved) -> None:
    for each in saved.summary.vectors:
        vector = saved.peft[each.target.module]
        expected = torch.histogram(vector, torch.tensor(saved.summary.bounds).double()).hist
        assert each.histogram == tuple(expected.int().tolist())
        assert sum(each.histogram) == each.size


def test_columns_are_means_of_neighbouring_features(saved: Saved) -> None:
    for each in saved.summary.vectors:
        parts = torch.tensor_split(saved.peft[each.target.module] - 1, COLUMNS)
        assert each.columns == pytest.approx([float(part.mean()) for part in parts])


def test_a_vector_has_no_more_columns_than_features(saved: Saved) -> None:
    for each in summarize(saved.vectors, 1000).vectors:
        assert len(each.columns) == each.size
    assert all(not each.columns for each in summarize(saved.vectors, 0).vectors)


def test_vectors_stand_in_the_order_of_layers(saved: Saved) -> None:
    assert [each.layer for each in saved.summary.vectors] == [0, 0, 0, 1, 1, 1]
    assert {each.kind for each in saved.summary.vectors} == {
        "model.layers.*.self_attn.k_proj",
        "model.layers.*.self_attn.v_proj",
        "model.layers.*.mlp.down_proj",
    }


def test_a_module_outside_of_layers_has_none() -> None:
    [head] = summarize(AdapterVectors({Target("lm_head2", Side.OUTPUT): torch.ones(2)}), 0).vectors

    assert (head.layer, head.kind) == (None, "lm_head2")


def test_an_adapter_that_changes_nothing_has_bounds_around_1() -> None:
    summary = summarize(adapter(k=[1.0, 1.0]), 1)

    assert (summary.bounds[0], summary.bounds[-1]) == pytest.approx((0, 2))
    assert (summary.vectors[0].norm, sum(summary.vectors[0].histogram)) == (0, 2)


def test_similarity_is_the_cosine_of_what_adapters_change(saved: Saved) -> None:
    one, other, more = (torch.tensor(v) for v in ([1.5, 0.2], [0.7, 1.1], [3.0, 1.0]))
    [[same, across], _] = similarity(
        [AdapterVectors({K: one, V: more}), AdapterVectors({K: other})]
    )
    changes = [torch.cat([one - 1, more - 1]), torch.cat([other - 1, torch.zeros(2)])]

    assert same == pytest.approx(1)
    assert across == pytest.approx(float(torch.cosine_similarity(*changes, dim=0)))
    assert similarity([saved.vectors])[0][0] == pytest.approx(1)


def test_the_opposite_and_what_has_nothing_in_common() -> None:
    more, less, elsewhere = adapter(k=[1.5]), adapter(k=[0.5]), adapter(v=[1.5])

    assert similarity([more, less, elsewhere])[0] == [1, -1, 0]


def test_what_changes_nothing_is_similar_to_nothing() -> None:
    assert similarity([adapter(k=[1.0]), adapter(k=[2.0])]) == [[None, None], [None, 1]]
