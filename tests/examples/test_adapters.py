"""The trained adapters that come with the project."""

import json
from pathlib import Path

import pytest
from peft import PeftConfig, PeftModel

from examples.train.model import Base, answers
from examples.train.tasks import TASKS

ADAPTERS = Path(__file__).parents[2] / "examples" / "adapters"
EXPECTED = json.loads((ADAPTERS / "expected.json").read_text())

adapters = pytest.mark.parametrize("name", TASKS)


@adapters
def test_each_task_has_an_adapter_with_a_card_and_a_neutral_base_name(name: str) -> None:
    config = PeftConfig.from_pretrained(ADAPTERS / name)

    assert config.base_model_name_or_path == "smollm2-135m-instruct"
    assert config.inference_mode
    assert "## Score on held-out data" in (ADAPTERS / name / "README.md").read_text()


@pytest.mark.real
@adapters
def test_peft_gives_the_answers_that_were_kept_at_training(name: str) -> None:
    base = Base.load()
    model = PeftModel.from_pretrained(base.model, ADAPTERS / name).eval()

    for kept in EXPECTED[name]:
        prompt = kept["messages"][0]["content"]
        assert answers(model, base.tokenizer, [prompt], max_new_tokens=64) == [kept["answer"]]
