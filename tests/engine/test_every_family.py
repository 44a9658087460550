"""Every causal and encoder-decoder class of transformers is served exactly, or refused."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from infuse.server.engine import UnsupportedModel
from tests.driver import Answer
from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Harness, worst_error
from tests.engine.models_page import PAGE, Outcome, beginning_of_type
from tests.every_family import CASES, WINDOW, not_tried, tiny_of
from tests.factories import save_adapter

TOKENS_OUT = 6
PROMPTS = {"short": 5, "beyond-the-window": 2 * WINDOW + 4}
"""Tokens of each."""
_TOLERANCE = 1e-3
"""Of log-probabilities of tiny models, in float32: added up in another order."""
_NOT_COMPILED = (
    r"(?:does not compile and runs uncompiled|runs by its modules|does not run .*?): (.*)"
)
QUICK = {
    "diffllama": "padded",
    "longcat_flash": "flat",
    "phimoe": "padded",
    "qwen2_moe": "padded",
    "ministral": "flat",
    "electra": "flat",
    "pegasus": "padded",
    "t5gemma": "padded",
    "megatron-bert": "padded",
    "roc_bert": "flat",
    "nllb-moe": "refused",
    "roformer": "refused",
    "xlnet": "refused",
    "rwkv": "refused",
}


def outcome_of(
    kind: str,
    start: Callable[..., Harness],
    logs: pytest.LogCaptureFixture,
    compile_cache: Path | None = None,
) -> Outcome:
    """Serve a tiny model of a type, and compare its answers with plain forwards."""
    # The oracle changes how its own model computes experts.
    model, oracle = tiny_of(kind), FamilyOracle(tiny_of(kind))
    name = type(model).__name__
    try:
        with logs.at_level(logging.INFO, "infuse.server.engine"):
            engine = start(
                model, {}, max_model_len=128, kv_cache_tokens=2048, compile_cache=compile_cache
            )
    except UnsupportedModel as error:
        return Outcome(kind, "refused", _line(str(error), name))
    with engine.held():
        for request, length in PROMPTS.items():
            engine.submit(request, prompt_of(length), max_tokens=TOKENS_OUT, logprobs=5)
    engine.wait()
    for request, length in PROMPTS.items():
        assert_exact(engine.answers[request], oracle, prompt_of(length))
    assert "runs again uncompiled" not in logs.text
    if engine.engine.core.runner_kind == "padded":
        return Outcome(kind, "padded", _why(rf"Running {name} padded: (.*)", logs.text, name))
    if compile_cache is None:
        return Outcome(kind, "flat", "")
    if engine.engine.stats().compiled:
        return Outcome(kind, "flat, compiled", "")
    return Outcome(kind, "flat", _why(_NOT_COMPILED, logs.text, name))


def prompt_of(length: int) -> list[int]:
    return [5 + 7 * n % 250 for n in range(length)]


def assert_exact(answer: Answer, oracle: FamilyOracle, prompt: list[int]) -> None:
    assert not answer.error
    wanted = oracle.logprobs(prompt, answer.tokens)
    assert answer.tokens == wanted.argmax(-1).tolist()
    for scored, row in zip(answer.logprobs, wanted, strict=True):
        tokens, values = zip(*scored.top, strict=True)
        assert list(values) == pytest.approx(row[list(tokens)].tolist(), abs=_TOLERANCE)


def _why(says: str, logs: str, name: str) -> str:
    reason = re.search(says, logs)
    assert reason is not None
    return _line(reason[1], name)


def _line(reason: str, name: str) -> str:
    """The padded runner's reason, which is the last one, on a line of a table."""
    first = reason.split("; and it cannot be run flat")[0].strip().split("\n")[0]
    first = first.removeprefix(f"{name} ").removeprefix("cannot be run padded: ")
    # How much is another number on another machine.
    return re.sub(r"its logits after .* differ from .*", "its logits differ", first)


@pytest.mark.parametrize("kind", QUICK)
def test_a_class_is_served_exactly_or_refused(
    start: Callable[..., Harness], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    assert outcome_of(kind, start, caplog).runs == QUICK[kind]


def test_an_adapter_within_the_head_is_exact_beside_other_rows(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    """The head sees only the tokens whose logits are wanted, in another order."""
    base = tiny_of("bert")
    within = {"target_modules": ["transform.dense"], "feedforward_modules": []}
    folder = save_adapter(base, tmp_path / "head", seed=1, task_type="CAUSAL_LM", **within)
    oracles = {"base": FamilyOracle(base), "head": FamilyOracle(base, [folder])}
    engine = start(base, {"head": folder})
    assert engine.engine.core.runner_kind == "flat"
    with engine.held():
        for name, length in (("base", 9), ("head", 5)):
            adapter = None if name == "base" else name
            engine.submit(name, prompt_of(length), adapter, prompt_logprobs=5, logprobs=5)
    engine.wait()
    for name, length in (("base", 9), ("head", 5)):
        prompt, answer = prompt_of(length), engine.answers[name]
        assert_exact(answer, oracles[name], prompt)
        of_prompt = oracles[name].logprobs(prompt[:1], [*prompt[1:], 5])
        assert worst_error(answer, of_prompt.double()) < _TOLERANCE


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("switch_transformers", "experts have no room for"),
        ("nllb-moe", "experts have no room for"),
        ("roformer", "it rotates all rows by the same positions"),
    ],
)
def test_a_refusal_says_in_words_what_the_class_does(
    start: Callable[..., Harness], kind: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        start(tiny_of(kind), {}, max_model_len=128, kv_cache_tokens=2048)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "compiled"


@pytest.fixture
def compile_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels are built once for all classes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared_cache))
    torch.compiler.reset()
    return shared_cache


@pytest.mark.full
@pytest.mark.usefixtures("only_kernels")
@pytest.mark.parametrize("kind", [kind for kind in CASES if not not_tried(kind)])
def test_every_class_is_served_exactly_or_refused(
    start: Callable[..., Harness],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    compile_cache: Path,
    kind: str,
) -> None:
    """Packed for oneDNN, and where that is flat, compiled with our own kernels, too."""
    outcome = outcome_of(kind, start, caplog)
    if outcome.runs == "flat":
        outcome = outcome_of(kind, start, caplog, compile_cache)
        assert outcome.runs.startswith("flat")
    request.node.user_properties.append(outcome.as_property)


def test_the_page_about_models_names_every_class() -> None:
    """`make test-full` writes it."""
    page = PAGE.read_text().partition("## Every class of transformers")[2]
    assert [kind for kind in CASES if beginning_of_type(kind) not in page] == []
