"""Sampling against transformers' own logits processors."""

from collections import abc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infuse.server.engine.native.sampling.sampler import Sampler
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.request import GenerationRequest, SamplingParams
from tests.factories import tiny_tokenizer

VOCAB = 40
END = 2


def sequence(row: int = 0, prompt: abc.Sequence[int] = (5,), **params: Any) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 9} | params)
    request = GenerationRequest(id=str(row), prompt=tuple(prompt), params=sampling)
    return Sequence(request, row, tiny_tokenizer())


def logits(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return 3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def warped(scores: torch.Tensor, prompt: abc.Sequence[int], params: dict[str, Any]) -> torch.Tensor:
    """transformers' distribution, `[vocab]`."""
    chain = LogitsProcessorList()
    if params.get("repetition_penalty", 1.0) != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params["repetition_penalty"]))
    chain.append(TemperatureLogitsWarper(params["temperature"]))
    if params.get("top_k"):
        chain.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1.0) < 1.0:
        chain.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        chain.append(MinPLogitsWarper(params["min_p"]))
    return chain(torch.tensor([list(prompt)]), scores.clone()).softmax(-1)[0]


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 1.5, "top_k": 5},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.2, "top_k": 20, "top_p": 0.7},
    {"temperature": 1.5, "min_p": 0.1},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "repetition_penalty": 1.7, "top_k": 12},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_many_draws_follow_transformers_distribution(params: dict[str, Any]) -> None:
    draws = 4000
    scores = logits(3)
    prompt = (5, 9, 11)
    rows = [sequence(row, prompt, seed=row, **params) for row in range(draws)]
    drawn = Sampler(frozenset()).sample(scores.expand(draws, -1), rows)

    found = torch.bincount(torch.tensor([s.token for s in drawn]), minlength=VOCAB) / draws
    wanted = warped(scores, prompt, params)
    assert not found[wanted == 0].any()
    assert (found - wanted).abs().sum() / 2 < 0.05


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, VOCAB),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.5),
)
def test_a_draw_is_never_outside_transformers_choice(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = logits(seed)
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    [drawn] = Sampler(frozenset()).sample(scores, [sequence(seed=seed, **params)])

    # Where a filter's border falls between two tokens, rounding may decide.
    wider = params | {"top_p": min(1.0, top_p + 1e-4), "min_p": max(0.0, min_p - 1e-4)}
    assert warped(scores, (5,), wider)[drawn.token] > 0


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_large_flat_vocabulary_is_truncated_beyond_the_sorted_candidates(top_p: float) -> None:
    scores = 0.01 * logits(0, vocab=5000)
    draws = 500
    rows = [sequence(row, seed=row, top_p=top_p) for row in range(draws)]
    drawn = [s.token for s in Sampler(frozenset()).sample(scores.expand(draws, -1), rows)]

    allowed = warped(scores, (5,), {"temperature": 1.0, "top_p": top_p}) > 0
    assert all(allowed[token] for token in drawn)
    assert len({scores[0].argsort(descending=True).tolist().index(t) > 512 for t in drawn}) == 2


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    scores = logits(1, rows=4)
    rows = [
        sequence(0, temperature=0.0),
        sequence(1, temperature=1.0, seed=1),
        sequence(2, temperature=1.0, top_k=1),
        sequence(3, temperature=0.0, logit_bias={7: 100.0}),
    ]
    tokens = [s.token for s in Sampler(frozenset()).sample(scores, rows)]
    [alone] = Sampler(frozenset()).sample(scores[1:2], [sequence(1, temperature=1.0, seed=1)])

    assert tokens == [int(scores[0].argmax()), alone.token, int(scores[2].argmax()), 7]


def test_presence_counts_once_and_frequency_every_time() -> None:
    """OpenAI's: logit - count * frequency_penalty - (count > 0) * presence_penalty, answer only."""
    scores = torch.zeros(1, VOCAB)
    row = sequence(prompt=(30, 30), temperature=0.0, frequency_penalty=1.0, presence_penalty=0.5)
    row.tokens += [10, 10, 11]
    biased = scores.clone()
    biased[0, 10], biased[0, 11], biased[0, 12] = 2.4, 1.4, -0.2

    [taken] = Sampler(frozenset()).sample(biased, [row])
    assert taken.token not in (10, 11, 12)
    biased[0, 10] = 2.6
    [taken] = Sampler(frozenset()).sample(biased, [row])
    assert taken.token == 10


def test_penalties_follow_the_tokens_as_they_come() -> None:
    """The state that is kept between steps equals the state made new at each step."""
    scores = logits(5)
    params = {"temperature": 0.0, "frequency_penalty": 2.0, "repetition_penalty": 1.3}
    kept, kept_row = Sampler(frozenset()), sequence(**params)
    taken = []
    for _ in range(8):
        [choice] = kept.sample(scores, [kept_row])
        again = sequence(**params)
        again.tokens += taken
        [fresh] = Sampler(frozenset()).sample(scores, [again])
        assert choice.token == fresh.token
        taken.append(choice.token)
        kept_row.tokens.append(choice.token)
    assert len(set(taken)) > 1


def test_logprobs_are_of_the_unfiltered_distribution() -> None:
    scores = logits(6)
    [taken] = Sampler(frozenset()).sample(
        scores, [sequence(temperature=0.3, top_k=1, logprobs=3, logit_bias={7: 50.0})]
    )
    exact = scores.log_softmax(-1)[0]

    assert taken.token == 7
    assert taken.logprob is not None
    assert taken.logprob.logprob == pytest.approx(exact[7].item())
    assert [token for token, _ in taken.logprob.top] == exact.topk(3).indices.tolist()


def test_an_output_that_is_not_finite_is_told() -> None:
    scores = logits(7, rows=3)
    scores[1] = torch.nan
    scores[2, 4] = torch.inf
    rows = [sequence(row, temperature=float(row % 2), seed=0) for row in range(3)]

    assert [s.finite for s in Sampler(frozenset()).sample(scores, rows)] == [True, False, False]


def test_the_logits_are_left_as_they_were() -> None:
    scores = logits(8)
    before = scores.clone()
    row = sequence(temperature=0.7, top_p=0.5, logit_bias={3: 1.0}, presence_penalty=1.0)
    Sampler(frozenset({END})).sample(scores, [row])

    assert torch.equal(scores, before)
