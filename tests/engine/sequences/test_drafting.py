"""What is drafted of a text, how likely, and when computing drafts pays."""

import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.scheduling.prefixes import Prefixes
from infuse.server.engine.native.scheduling.speculation import MOST, Speculation, StepCosts
from infuse.server.engine.native.sequences.drafting import Drafter
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import GenerationRequest, SamplingParams
from tests.factories import tiny_tokenizer

TEXT = [3, 1, 4, 15, 9, 2, 6]


def reader(*texts: list[int], prediction: list[int] | None = None) -> Drafter:
    """The first text is the prompt, the others are answered, token by token."""
    drafter = Drafter(texts[0], prediction or ())
    tokens: list[int] = list(texts[0])
    drafter.read(tokens)
    for token in itertools.chain(*texts[1:]):
        tokens.append(token)
        drafter.read(tokens)
    return drafter


def draft_of(drafter: Drafter, most: int = 8) -> list[int]:
    return list(drafter.draft(len(chances))) if (chances := drafter.chances(most)) else []


def test_what_followed_the_latest_tokens_before_is_drafted() -> None:
    assert draft_of(reader([*TEXT, 30, 4, 15]), 3) == [9, 2, 6]
    assert draft_of(reader([*TEXT, 30], [4, 15]), 3) == [9, 2, 6]


def test_nothing_is_drafted_where_nothing_came_before() -> None:
    assert reader(TEXT).chances(8) == []
    assert reader([5]).chances(8) == []
    assert reader([*TEXT, 15]).chances(8) == []  # one token alone says little


def test_the_latest_of_several_places_is_taken() -> None:
    assert draft_of(reader([4, 15, 7, 4, 15, 8, 4, 15]), 1) == [8]


def test_three_tokens_say_more_than_two() -> None:
    assert draft_of(reader([1, 4, 15, 7, 2, 4, 15, 8, 1, 4, 15]), 1) == [7]


def test_a_place_stays_as_long_as_it_agrees() -> None:
    """The text before it came up elsewhere, too, and later."""
    assert draft_of(reader([1, 2, 3, 4, 5, 9, 3, 4, 8], [1, 2, 3, 4]), 1) == [5]


def test_a_text_that_runs_in_circles_is_drafted_to_go_on() -> None:
    assert draft_of(reader([7, 8, 9] * 3), 7)[:5] == [7, 8, 9, 7, 8]
    assert draft_of(reader([6, 6, 6]), 4) == [6] * len(draft_of(reader([6, 6, 6]), 4))


def test_chances_fall_with_each_drafted_token_and_rise_with_each_accepted_one() -> None:
    copied = [*range(10, 40)]
    early = reader([*copied, 99], copied[:3]).chances(MOST)
    late = reader([*copied, 99], copied[:14]).chances(MOST)

    assert early == sorted(early, reverse=True)
    assert all(after > before for before, after in zip(early, late, strict=False))
    assert len(late) == MOST


def test_drafts_that_are_rejected_become_unlikely() -> None:
    rng = random.Random(1)
    prompt = [rng.randrange(4) for _ in range(60)]
    drafter = reader(prompt, [rng.randrange(4) for _ in range(200)])
    first = [reader(prompt, [t]).chances(1) for t in range(4)]

    assert all(drafter.chances(1) < each for each in first if each)


def test_a_prediction_is_expected_from_the_answers_start() -> None:
    drafter = reader([50, 51], prediction=TEXT)
    assert draft_of(drafter) == TEXT  # and not beyond its end
    drafter = reader([50, 51], TEXT[:4], prediction=TEXT)
    assert draft_of(drafter) == TEXT[4:]
    assert drafter.predicted_tokens == 4


def test_an_exchanged_token_costs_a_prediction_only_itself() -> None:
    drafter = reader([50, 51], [3, 1, 99, 15, 9], prediction=TEXT)
    assert drafter.predicted_tokens == 4
    assert draft_of(drafter, 1) == [2]


def test_a_prediction_is_found_again_after_an_insertion() -> None:
    drafter = reader([50, 51], [3, 77, 78, 79, 1, 4, 15], prediction=TEXT)
    assert draft_of(drafter, 2) == [9, 2]


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    answer=st.lists(st.integers(0, 3), max_size=60),
    prediction=st.lists(st.integers(0, 3), max_size=20),
    most=st.integers(0, 40),
)
def test_drafts_are_tokens_that_came_before(
    prompt: list[int], answer: list[int], prediction: list[int], most: int
) -> None:
    drafter = reader(prompt, answer, prediction=prediction)
    chances = drafter.chances(most)

    assert len(chances) <= most
    assert all(0 < chance <= 1 for chance in chances)
    assert set(draft_of(drafter, most)) <= {*prompt, *answer, *prediction}


class Times(StepCosts):
    """Seconds by tokens, as measured elsewhere."""

    def __init__(self, fixed: float, each: float) -> None:
        super().__init__()
        self.learn(1, fixed + each)
        self.learn(1024, fixed + 1024 * each)


def decoding(rows: int, agreeing: int = 12, **params: int) -> Step:
    """Rows that have copied `agreeing` tokens of their prompts."""
    sequences = []
    for row in range(rows):
        copied = [*range(10, 60)]
        request = GenerationRequest(
            id=str(row),
            prompt=(*copied, row),
            params=SamplingParams(**{"max_tokens": 50} | params),
            speculation=True,
        )
        sequence = Sequence(request, row, tiny_tokenizer())
        sequence.tokens += copied[:agreeing]
        sequence.computed = len(sequence.tokens) - 1
        sequences.append(sequence)
    return Step(sequences, [])


def prefixes_of(step: Step, slabs: int = 64) -> Prefixes:
    """With room for the step's rows."""
    cache = StripCache(
        [LayerShape(1, 1, 1, torch.float32)], total_tokens=slabs * 128, max_tokens=128
    )
    for sequence in step.decode:
        assert cache.reserve(sequence.seq_id, len(sequence.tokens))
    return Prefixes(cache, across_orders=True)


def drafted(step: Step, costs: StepCosts, slabs: int = 64) -> tuple[Step, Speculation]:
    speculation = Speculation(by_default=True, possible=True)
    speculation.costs = costs
    for sequence in step.decode:
        sequence.drafter = speculation.drafter(sequence.request)
    return speculation.draft(step, prefixes_of(step, slabs)), speculation


def lengths(step: Step) -> list[int]:
    return [len(draft.tokens) for draft in step.drafts]


def test_rows_are_drafted_as_far_as_may_be_where_tokens_cost_nothing() -> None:
    step, _ = drafted(decoding(4), Times(1.0, 0.0))

    assert (step.decode, lengths(step)) == ([], [MOST] * 4)
    assert [draft.tokens[:3] for draft in step.drafts] == [(22, 23, 24)] * 4
    assert step.tokens == 4 * (1 + MOST)


def test_nothing_is_drafted_where_each_token_takes_its_time() -> None:
    step, _ = drafted(decoding(4), Times(0.0, 1.0))

    assert (len(step.decode), step.drafts) == (4, [])


def test_few_rows_are_drafted_far_and_many_less_far() -> None:
    costs = Times(0.017, 0.0007)
    [alone] = lengths(drafted(decoding(1), costs)[0])
    many = lengths(drafted(decoding(32), costs)[0])

    assert alone > 10
    assert sum(many) / 32 < alone / 2


def test_rows_that_copy_are_drafted_before_rows_that_may_not() -> None:
    sure, unsure = decoding(2, agreeing=12).decode, decoding(2, agreeing=2).decode
    for sequence in unsure:
        sequence.seq_id += 2
    step, _ = drafted(Step([*sure, *unsure], []), Times(0.004, 0.001))

    assert {draft.sequence for draft in step.drafts} == set(sure)
    assert step.decode == unsure


def test_no_more_is_drafted_than_the_answer_may_have() -> None:
    step, _ = drafted(decoding(1, max_tokens=15), Times(1.0, 0.0))
    assert lengths(step) == [15 - 12 - 1]
    step, _ = drafted(decoding(1, max_tokens=13), Times(1.0, 0.0))
    assert step.drafts == []


def test_a_row_without_room_decodes_on() -> None:
    full = decoding(2)
    for sequence in full.decode:
        sequence.tokens += [60] * (128 - len(sequence.tokens))
        sequence.computed = 127
    step, _ = drafted(full, Times(1.0, 0.0), slabs=2)

    assert (step.decode, step.drafts) == (full.decode, [])


def test_what_disappoints_is_left_and_tried_again_later() -> None:
    step, speculation = drafted(decoding(4), Times(1.0, 0.0))
    plain = decoding(4)
    for sequence in plain.decode:
        sequence.drafter = speculation.drafter(sequence.request)
    speculation.costs = Times(0.01, 0.0001)
    for _ in range(40):
        speculation.learn(step, seconds=0.2, accepted=0)
    assert speculation.draft(plain, prefixes_of(plain)).drafts == []
    for _ in range(400):
        speculation.learn(plain, seconds=0.01, accepted=0)

    assert speculation.draft(plain, prefixes_of(plain)).drafts != []
    assert (speculation.drafted_tokens, speculation.accepted_tokens) == (40 * 4 * MOST, 0)


def test_times_between_two_that_are_known_lie_between_them() -> None:
    costs = StepCosts()
    costs.learn(4, 0.02)
    costs.learn(64, 0.08)

    assert costs.seconds(4) == 0.02
    assert costs.seconds(34) == pytest.approx(0.05)
    assert costs.seconds(1) == 0.02
    assert costs.seconds(128) == pytest.approx(0.16)


def test_a_short_time_is_believed_at_once_and_a_long_one_slowly() -> None:
    costs = StepCosts()
    for seconds in (0.05, 0.02, 0.9, 0.02):
        costs.learn(8, seconds)
    assert costs.seconds(8) < 0.021
    for _ in range(50):
        costs.learn(8, 0.05)
    assert costs.seconds(8) == pytest.approx(0.05, rel=0.05)
