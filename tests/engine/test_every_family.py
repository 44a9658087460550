"""Every causal and encoder-decoder class of transformers is served exactly, or refused."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.engine import UnsupportedModel
from tests.engine.family_oracle import FamilyOracle
from tests.engine.harness import Answer, Harness, worst_error
from tests.engine.models_page import PAGE, Outcome, beginning_of_type
from tests.every_family import CASES, WINDOW, not_tried, tiny_of
from tests.factories import save_adapter

TOKENS_OUT = 6
PROMPTS = {"short": 5, "beyond-the-window": 2 * WINDOW + 4}
"""Tokens of each."""
_TOLERANCE = 1e-3
"""Of log-probabilities of tiny models, in float32: added up in another order."""
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
    "xlnet": "refused",
    "rwkv": "refused",
}


def outcome_of(kind: str, start: Callable[..., Harness], logs: pytest.LogCaptureFixture) -> Outcome:
    """Serve a tiny model of a type, and compare its answers with plain forwards."""
    model = tiny_of(kind)
    oracle, name = FamilyOracle(model), type(model).__name__
    try:
        with logs.at_level(logging.INFO, "server.engine"):
            engine = start(model, {}, max_model_len=128, kv_cache_tokens=2048)
    except UnsupportedModel as error:
        return Outcome(kind, "refused", _line(str(error), name))
    with engine.held():
        for request, length in PROMPTS.items():
            engine.submit(request, prompt_of(length), max_tokens=TOKENS_OUT, logprobs=5)
    engine.wait()
    for request, length in PROMPTS.items():
        assert_exact(engine.answers[request], oracle, prompt_of(length))
    runs = engine.engine.runner_kind
    return Outcome(kind, runs, _why_padded(logs.text, name) if runs == "padded" else "")


def prompt_of(length: int) -> list[int]:
    return [5 + 7 * n % 250 for n in range(length)]


def assert_exact(answer: Answer, oracle: FamilyOracle, prompt: list[int]) -> None:
    assert not answer.error
    wanted = oracle.logprobs(prompt, answer.tokens)
    assert answer.tokens == wanted.argmax(-1).tolist()
    for scored, row in zip(answer.logprobs, wanted, strict=True):
        tokens, values = zip(*scored.top, strict=True)
        assert list(values) == pytest.approx(row[list(tokens)].tolist(), abs=_TOLERANCE)


def _why_padded(logs: str, name: str) -> str:
    reason = re.search(rf"Running {name} padded: (.*)", logs)
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
    assert engine.engine.runner_kind == "flat"
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


@pytest.mark.full
@pytest.mark.parametrize("kind", [kind for kind in CASES if not not_tried(kind)])
def test_every_class_is_served_exactly_or_refused(
    start: Callable[..., Harness],
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    kind: str,
) -> None:
    outcome = outcome_of(kind, start, caplog)
    request.node.user_properties.append(outcome.as_property)


def test_the_page_about_models_names_every_class() -> None:
    """`make test-full` writes it."""
    page = PAGE.read_text().partition("## Every class of transformers")[2]
    assert [kind for kind in CASES if beginning_of_type(kind) not in page] == []
