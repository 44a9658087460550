"""What was computed for one request serves a later one that begins alike; nothing else changes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from shutil import copytree
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.adapters.registry import Part
from tests.driver import Answer
from tests.engine.harness import Harness, Oracle
from tests.factories import TOKENS, save_adapter, tiny_model

PROMPT = [5 + (7 * n) % 200 for n in range(100)]
SCORED = {"max_tokens": 6, "logprobs": 0}


def logprobs(answer: Answer) -> list[float]:
    return [scored.logprob for scored in answer.logprobs]


def computed(engine: Harness) -> int:
    return engine.engine.stats().prompt_tokens


@pytest.fixture(scope="module")
def named(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two names for one content, and another content."""
    twin = tmp_path_factory.mktemp("twin") / "twin"
    copytree(adapters["default"], twin)
    return {"default": adapters["default"], "twin": twin, "regex": adapters["regex"]}


@pytest.mark.parametrize("config", [{}, {"pack_linears": False}, {"prefill_chunk_tokens": 7}])
def test_a_prompt_that_is_known_answers_as_one_that_is_not(
    start: Callable[..., Harness], config: dict[str, Any]
) -> None:
    engine = start(**config)
    plain = start(prefix_cache=False, **config)
    first = engine.ask(PROMPT, "default", **SCORED)
    again = engine.ask(PROMPT, "default", **SCORED)
    longer = engine.ask([*PROMPT, 9, 10, 11], "default", **SCORED)

    assert computed(engine) == len(PROMPT) + 1 + 3
    wanted = plain.ask(PROMPT, "default", **SCORED)
    assert first.tokens == again.tokens == wanted.tokens
    assert logprobs(first) == logprobs(wanted)
    assert logprobs(again) == pytest.approx(logprobs(wanted), abs=1e-5)
    wanted = plain.ask([*PROMPT, 9, 10, 11], "default", **SCORED)
    assert longer.tokens == wanted.tokens
    assert logprobs(longer) == pytest.approx(logprobs(wanted), abs=1e-5)
    assert computed(plain) == 2 * len(PROMPT) + 3
    engine.assert_idle()


def test_a_hit_equals_a_prompt_in_chunks_bit_for_bit(start: Callable[..., Harness]) -> None:
    """The first chunk is what was kept, the second one what is computed."""
    whole = PROMPT[:96]
    engine, plain = (
        start(prefill_chunk_tokens=64),
        start(prefill_chunk_tokens=64, prefix_cache=False),
    )
    engine.ask(whole[:64], "default", max_tokens=1)
    hit = engine.ask(whole, "default", **SCORED)

    assert computed(engine) == 64 + 32
    assert logprobs(hit) == logprobs(plain.ask(whole, "default", **SCORED))


def test_a_conversation_goes_on_without_computing_it_again(start: Callable[..., Harness]) -> None:
    engine, plain = start(), start(prefix_cache=False)
    said = list(PROMPT)
    for turn in range(3):
        before = computed(engine)
        answer = engine.ask(said, "default", max_tokens=20)
        assert answer.tokens == plain.ask(said, "default", max_tokens=20).tokens
        new = len(said) if turn == 0 else 1 + 5  # the answer's last token was never computed
        assert computed(engine) - before == new
        said += [*answer.tokens, 9, 8, 7, 6, turn]


def test_names_do_not_matter_and_contents_do(
    start: Callable[..., Harness], named: dict[str, Path]
) -> None:
    engine = start(None, named)
    oracle = {name: Oracle(tiny_model("llama"), folder) for name, folder in named.items()}
    counts = {}
    for who in ("default", "twin", "regex", "default@1"):
        before = computed(engine)
        tokens = engine.ask(PROMPT, who).tokens
        assert tokens == oracle[who.partition("@")[0]].greedy(PROMPT, 8)
        counts[who] = computed(engine) - before
    base = engine.ask(PROMPT)

    assert counts == {"default": 100, "twin": 1, "regex": 100, "default@1": 1}
    assert base.tokens == Oracle(tiny_model("llama")).greedy(PROMPT, 8)
    assert computed(engine) == 2 * 101 + 100


def test_mixtures_and_strengths_share_by_what_they_do(
    start: Callable[..., Harness], named: dict[str, Path]
) -> None:
    engine = start(None, named)

    def new_tokens(*parts: Part) -> int:
        before = computed(engine)
        engine.ask(PROMPT, engine.registry.lease_mixture(parts, "product"))
        return computed(engine) - before

    assert new_tokens(Part("default", 0.5)) == 100
    assert new_tokens(Part("default", 0.25)) == 100
    assert new_tokens(Part("default", 0.5)) == 1
    assert new_tokens(Part("twin", 0.5)) == 1
    assert new_tokens(Part("default"), Part("regex")) == 100
    assert new_tokens(Part("twin"), Part("regex")) == 1


def test_a_new_revision_shares_nothing_and_a_rollback_everything(
    start: Callable[..., Harness], named: dict[str, Path]
) -> None:
    engine = start(None, {"it": named["default"]})
    first = engine.ask(PROMPT, "it")
    with engine.store.staging() as staged:
        for file in named["regex"].iterdir():
            (staged / file.name).write_bytes(file.read_bytes())
        engine.registry.replace("it", staged)
    second = engine.ask(PROMPT, "it")
    assert computed(engine) == 2 * len(PROMPT)
    assert second.tokens == Oracle(tiny_model("llama"), named["regex"]).greedy(PROMPT, 8)
    engine.registry.roll_back("it", 1)

    assert engine.ask(PROMPT, "it").tokens == first.tokens
    assert computed(engine) == 2 * len(PROMPT) + 1


def test_whole_modules_are_part_of_the_content(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    """Equal vectors, but embeddings of their own; and the same twice under two names."""
    base = tiny_model("llama")
    kinds: Mapping[str, dict[str, Any]] = {
        "plain": {},
        "own": {"modules_to_save": ["embed_tokens"]},
        "same": {"modules_to_save": ["embed_tokens"]},
    }
    offered = {
        name: save_adapter(base, tmp_path / name, seed=3, **config)
        for name, config in kinds.items()
    }
    engine = start(tiny_model("llama"), offered)
    for name, new in (("plain", 100), ("own", 100), ("same", 1)):
        before = computed(engine)
        tokens = engine.ask(PROMPT, name).tokens
        assert computed(engine) - before == new
        assert tokens == Oracle(base, offered[name]).greedy(PROMPT, 8)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tokens_that_adapters_add_are_those_of_each(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    """Equal ids, equal vectors; what the added token means differs, or does not."""
    larger = tiny_model("llama")
    larger.resize_token_embeddings(TOKENS + 1, mean_resizing=False)
    folders = {}
    for name, seed in (("one", 4), ("other", 5), ("same", 4)):
        both = ["embed_tokens", "lm_head"]
        folders[name] = save_adapter(larger, tmp_path / name, seed=seed, modules_to_save=both)
    engine = start(tiny_model("llama"), folders)
    prompt = [TOKENS, *PROMPT]
    for name, new in (("one", 101), ("other", 101), ("same", 1)):
        before = computed(engine)
        tokens = engine.ask(prompt, name).tokens
        assert computed(engine) - before == new
        assert tokens == Oracle(larger, folders[name]).greedy(prompt, 8)


def test_a_salt_keeps_requests_apart(start: Callable[..., Harness]) -> None:
    engine = start()
    for salt, new in (("", 100), ("a", 100), ("b", 100), ("a", 1), ("", 1)):
        before = computed(engine)
        engine.submit(salt or "none", PROMPT, "default", cache_salt=salt)
        engine.wait(salt or "none")
        assert computed(engine) - before == new


def test_prompts_that_are_scored_are_computed_from_where_the_scores_begin(
    start: Callable[..., Harness],
) -> None:
    engine, plain = start(), start(prefix_cache=False)
    engine.ask(PROMPT, "default")
    for first, new in ((1, 100), (90, 11)):
        before = computed(engine)
        asked = {"max_tokens": 1, "prompt_logprobs": 2, "prompt_logprobs_from": first}
        scores = engine.ask(PROMPT, "default", **asked).prompt_logprobs
        wanted = plain.ask(PROMPT, "default", **asked).prompt_logprobs
        assert scores is not None
        assert wanted is not None
        assert computed(engine) - before == new
        assert [s and s.token_id for s in scores] == [s and s.token_id for s in wanted]
        assert [s.logprob for s in scores if s] == pytest.approx(
            [s.logprob for s in wanted if s], abs=1e-5
        )


def test_who_comes_while_a_prompt_is_computed_waits_for_it(start: Callable[..., Harness]) -> None:
    engine = start(prefill_chunk_tokens=16)
    alone = engine.ask(PROMPT, "regex").tokens
    before = computed(engine)
    with engine.held():
        for number in range(4):
            engine.submit(str(number), PROMPT, "default")
        engine.submit("another", PROMPT[::-1], "default")
    engine.wait()

    assert computed(engine) - before == len(PROMPT) + 3 + len(PROMPT) + 1
    assert len({tuple(engine.answers[str(n)].tokens) for n in range(4)}) == 1
    assert engine.ask(PROMPT, "regex").tokens == alone
    engine.assert_idle()


def test_without_a_prefix_cache_nothing_is_kept(start: Callable[..., Harness]) -> None:
    engine = start(prefix_cache=False)
    engine.order("one", [PROMPT] * 3, "default")
    engine.wait()
    assert computed(engine) == len(PROMPT) + 2
    engine.order("two", [PROMPT] * 3, "default")
    engine.wait()

    assert computed(engine) == 2 * (len(PROMPT) + 2)
    assert engine.engine.stats().kv_tokens_cached == 0


def test_what_is_kept_goes_before_any_row_waits_or_gives_way(
    start: Callable[..., Harness],
) -> None:
    """Four rows fill the cache to the last token, whatever was kept before."""
    chance = Random(1)
    engine = start(max_rows=4, kv_cache_tokens=1024)
    for _ in range(12):
        engine.ask([chance.randint(5, 250) for _ in range(100)], "default")
    assert engine.engine.stats().kv_tokens_cached >= 512
    with engine.held():
        for number in range(4):
            prompt = [chance.randint(5, 250) for _ in range(200)]
            engine.submit(str(number), prompt, "default", max_tokens=50)
    engine.wait()
    stats = engine.engine.stats()

    assert stats.preemptions == 0
    assert stats.kv_tokens_used + stats.kv_tokens_cached <= stats.kv_tokens_total
    engine.assert_idle()


def test_the_least_recently_used_goes_first(start: Callable[..., Harness]) -> None:
    engine = start(max_rows=1, kv_cache_tokens=512)
    prompts = [[5 + (n * k) % 250 for k in range(100)] for n in (3, 7, 11, 13, 17)]
    engine.ask(prompts[0], max_tokens=1)
    for prompt in prompts[1:]:
        engine.ask(prompt, max_tokens=1)
        before = computed(engine)
        engine.ask(prompts[0], max_tokens=1)
        assert computed(engine) - before == 1
    before = computed(engine)
    engine.ask(prompts[1], max_tokens=1)

    assert computed(engine) - before > 1


def test_rows_that_give_way_take_up_what_is_still_kept(start: Callable[..., Harness]) -> None:
    config = {"max_rows": 4, "kv_cache_tokens": 512}
    engine, plain = start(**config), start(prefix_cache=False)
    prompts = [[*PROMPT[: 20 * n + 10], n] for n in range(4)]
    for number, prompt in enumerate(prompts):
        engine.submit(str(number), prompt, "default", max_tokens=100)
    engine.wait()

    assert engine.engine.stats().preemptions > 0
    for number, prompt in enumerate(prompts):
        wanted = plain.ask(prompt, "default", max_tokens=100).tokens
        assert engine.answers[str(number)].tokens == wanted
    engine.assert_idle()


@settings(max_examples=15)
@given(
    asked=st.lists(
        st.tuples(
            st.sampled_from([None, "default", "twin", "regex"]),
            st.integers(0, 2),
            st.integers(1, 100),
            st.lists(st.integers(5, 250), max_size=5),
        ),
        min_size=2,
        max_size=10,
    )
)
def test_whatever_is_shared_answers_are_those_of_the_adapter_alone(
    engines: list[Harness],
    asked: list[tuple[str | None, int, int, list[int]]],
) -> None:
    """Invariant 4: names, contents and prompts that are alike or not, at the same time."""
    engine, plain = engines
    prompts = [
        (who, [*([5 + stem, 9, 77 - stem] * 40)[:length], *end]) for who, stem, length, end in asked
    ]
    for number, (who, prompt) in enumerate(prompts):
        engine.submit(str(number), prompt, who, max_tokens=4)
    engine.wait()
    found = [engine.answers.pop(str(number)).tokens for number in range(len(prompts))]

    assert found == [plain.ask(prompt, who, max_tokens=4).tokens for who, prompt in prompts]


@pytest.fixture(scope="module")
def engines(named: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    both = [
        Harness(tiny_model("llama"), tmp_path_factory.mktemp("store"), named, **config)
        for config in (
            {"kv_cache_tokens": 1024, "prefill_chunk_tokens": 48, "max_rows": 4},
            {"prefix_cache": False},
        )
    ]
    yield both
    for harness in both:
        harness.assert_idle()
        harness.close()
