"""Rows that run padded keep PEFT's results whatever happens to the batch around them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from infuse.server.engine.errors import DoesNotFit
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Harness
from tests.factories import save_adapter
from tests.families import FAMILIES, tiny

PADDED = ["bloom", "gpt_neo", "llama4_text", "t5", "bart"]
"""ALiBi; local attention; chunked attention; relative and learned positions of a decoder."""


@pytest.fixture(params=PADDED)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def adapter(base: PreTrainedModel, family: str, folder: Path) -> Path:
    return save_adapter(base, folder, **FAMILIES[family].default_config)


def prompts(count: int) -> dict[str, list[int]]:
    """By request id."""
    return {
        str(k): [5 + (11 * k + 3 * n) % 250 for n in range(1 + 5 * k % 23)] for k in range(count)
    }


def test_rows_that_come_and_go_leave_the_others_as_they_are(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    """Answers of 1 to 24 tokens in a batch of 4 rows: the batch changes at nearly every step."""
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder}, max_rows=4)
    asked = prompts(9)
    with engine.held():
        for name, prompt in asked.items():
            engine.submit(name, prompt, "a", max_tokens=1 + 3 * int(name) % 24)
    engine.wait()

    FamilyOracle(tiny(family), [folder]).assert_answered(engine, asked)
    engine.assert_idle()


def test_rows_that_outgrow_the_cache_are_preempted_and_end_the_same(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder}, kv_cache_tokens=512, max_model_len=130)
    asked = {str(number): [5 + number] for number in range(8)}
    with engine.held():
        for name, prompt in asked.items():
            engine.submit(name, prompt, "a", max_tokens=128)
    engine.wait()

    assert engine.engine.stats().preemptions > 0
    FamilyOracle(tiny(family), [folder]).assert_answered(engine, asked)
    engine.assert_idle()


def test_a_long_answer_beyond_a_groups_columns_is_exact(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder})
    asked = prompts(2)
    with engine.held():
        for name, prompt in asked.items():
            engine.submit(name, prompt, "a", max_tokens=150)
    engine.wait()

    FamilyOracle(tiny(family), [folder]).assert_answered(engine, asked)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj"])
def test_a_prompt_is_scored_as_peft_scores_it(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder}, prefill_chunk_tokens=9)
    prompt = [5 + 3 * n for n in range(30)]

    scored = engine.ask(prompt, "a", max_tokens=0, prompt_logprobs=0).prompt_logprobs

    FamilyOracle(tiny(family), [folder]).assert_scored(prompt, scored)


@pytest.mark.parametrize("family", ["bloom", "gpt_neo"])
def test_requests_that_begin_alike_are_computed_once_and_end_as_alone(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder})
    common = [5 + 7 * n % 250 for n in range(50)]
    asked = [[*common, *rest] for rest in ([9], [10, 11, 12], [13, 14])]
    ids = engine.order("order", asked, "a")
    engine.wait()

    oracle = FamilyOracle(tiny(family), [folder])
    oracle.assert_answered(engine, dict(zip(ids, asked, strict=True)))
    assert engine.engine.stats().prompt_tokens < 2 * len(common)
    engine.assert_idle()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_source_that_was_read_is_read_by_whoever_does_the_same(
    start: Callable[..., Harness], tmp_path: Path, family: str
) -> None:
    base = tiny(family)
    folder = adapter(base, family, tmp_path / "a")
    engine = start(base, {"a": folder, "twin": folder})
    source = [5 + 7 * n % 250 for n in range(50)]
    answers, read = {}, {}
    for who in (None, "a", "twin"):
        before = engine.engine.stats().prompt_tokens
        answers[who] = engine.ask(source, who).tokens
        read[who] = engine.engine.stats().prompt_tokens - before
    other = engine.ask([*source[:-1], 9], "a").tokens

    start_tokens = len(engine.engine.model.decoder_start or ())
    assert read == {None: 50 + start_tokens, "a": 50 + start_tokens, "twin": start_tokens}
    plain, adapted = FamilyOracle(tiny(family)), FamilyOracle(tiny(family), [folder])
    for oracle, prompt, answer in (
        (plain, source, answers[None]),
        (adapted, source, answers["twin"]),
        (adapted, [*source[:-1], 9], other),
    ):
        assert answer == oracle.logprobs(prompt, answer).argmax(-1).tolist()
    assert answers["a"] == answers["twin"]
    engine.assert_idle()


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("bloom", ["lm_head"]),
        ("falcon", ["word_embeddings"]),
        ("llama4_text", ["lm_head", "norm"]),
        ("t5", ["lm_head"]),
    ],
)
def test_rows_take_their_adapters_own_modules_and_others_the_bases(
    start: Callable[..., Harness], tmp_path: Path, family: str, modules: list[str]
) -> None:
    base, config = tiny(family), FAMILIES[family].default_config
    folders = {
        "own": save_adapter(base, tmp_path / "own", modules_to_save=modules, **config),
        "plain": save_adapter(base, tmp_path / "plain", seed=2, **config),
    }
    engine = start(base, folders)
    asked, names = prompts(4), dict(zip("0123", ["own", None, "plain", "own"], strict=True))
    with engine.held():
        for request_id, prompt in asked.items():
            engine.submit(request_id, prompt, names[request_id], max_tokens=8)
    engine.wait()

    for request_id, name in names.items():
        oracle = FamilyOracle(tiny(family), [] if name is None else [folders[name]])
        oracle.assert_answered(engine, {request_id: asked[request_id]})
    engine.assert_idle()


SHAPES = [LayerShape(2, 8, 8, torch.float32)]
CPU = torch.device("cpu")


def test_a_cache_counts_the_padding_of_its_rows() -> None:
    cache = PaddedCache(SHAPES, CPU, total_tokens=512, max_tokens=256)

    assert cache.reserve(0, 10)
    assert cache.used_tokens == 64
    assert cache.reserve(1, 200)
    assert cache.used_tokens == 2 * 256
    assert not cache.reserve(2, 10)
    cache.release(1)
    assert cache.reserve(2, 10)
    assert cache.used_tokens == 2 * 64


def test_a_cache_too_small_for_the_longest_row_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="kv-cache-tokens to 256"):
        PaddedCache(SHAPES, CPU, total_tokens=192, max_tokens=250)


def test_rows_keep_their_group_while_they_run_together() -> None:
    cache = PaddedCache(SHAPES, CPU, total_tokens=4096, max_tokens=256)
    group = cache.gather([0, 1], [0, 0], 1)
    with group.advancing([1, 1]):
        pass

    assert cache.gather([0, 1], [1, 1], 1) is group
    assert cache.gather([0], [1], 1) is not group


def test_what_a_failed_step_wrote_is_undone() -> None:
    cache = PaddedCache(SHAPES, CPU, total_tokens=4096, max_tokens=256)
    group = cache.gather([0, 1], [0, 0], 3)
    with group.advancing([3, 2]):
        pass

    assert cache.gather([1], [0], 3).length(1) == 0
    assert group.length(0) == 0


def test_rows_take_their_keys_and_values_into_another_group() -> None:
    cache = PaddedCache(SHAPES, CPU, total_tokens=4096, max_tokens=256)
    first, second = cache.gather([0, 1], [0, 0], 5), cache.gather([2], [0], 3)
    written = torch.arange(2 * 2 * 5 * 8, dtype=torch.float32).view(2, 2, 5, 8) + 1
    for group, states in ((first, written), (second, written[:1, :, :3] + 1000)):
        with group.advancing([states.shape[2]] * len(group.seq_ids)) as taken:
            taken.update(states, -states, 0)

    joined = cache.gather([1, 2], [5, 3], 1)

    keys, values = joined.layers[0]
    assert (joined.starts, joined.end) == ([0, 2], 5)
    assert torch.equal(keys[0, :, :5], written[1])
    assert torch.equal(keys[1, :, 2:5], written[0, :, :3] + 1000)
    assert torch.equal(values[0, :, :5], -written[1])
    assert not keys[1, :, :2].any()
