"""Where a request's sampling parameters come from."""

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.completion_schemas import CompletionBody
from infuse.server.api.orders import params_of_choice
from infuse.server.api.sampling import SamplingDefaults, sampling_params
from infuse.server.engine.request import SamplingParams
from tests.api.conftest import RunningServer


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "m", "prompt": "a"} | fields)


def params(server: RunningServer, **fields: Any) -> SamplingParams:
    model = server.services.engine.model
    vocabulary = Vocabulary(model.tokenizer, model.vocab_size)
    return sampling_params(model, vocabulary, body(**fields), max_tokens=8, logprobs=None)


def test_a_sampling_model_brings_its_own_defaults() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.9)

    assert SamplingDefaults.of(config) == SamplingDefaults(temperature=0.6, top_k=20, top_p=0.9)


@pytest.mark.parametrize("config", [None, GenerationConfig(), GenerationConfig(do_sample=False)])
def test_other_models_get_openais_defaults(config: GenerationConfig | None) -> None:
    assert SamplingDefaults.of(config) == SamplingDefaults(1.0, 0, 1.0, 0.0, 1.0)


def test_a_saved_config_is_read_as_it_was_written(tmp_path: Path) -> None:
    GenerationConfig(do_sample=True, min_p=0.05, repetition_penalty=1.1).save_pretrained(tmp_path)

    defaults = SamplingDefaults.of(GenerationConfig.from_pretrained(tmp_path))

    assert (defaults.min_p, defaults.repetition_penalty) == (0.05, 1.1)
    assert (defaults.temperature, defaults.top_p) == (1.0, 1.0)


def test_what_a_request_says_wins(server: RunningServer) -> None:
    said = params(server, temperature=0.3, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=1.2)

    assert (said.temperature, said.top_k, said.top_p) == (0.3, 5, 0.5)
    assert (said.min_p, said.repetition_penalty) == (0.1, 1.2)


def test_a_vanishing_temperature_is_greedy(server: RunningServer) -> None:
    assert params(server, temperature=1e-300).temperature == 0


@pytest.mark.parametrize(("asked", "meant"), [(-1, 0), (0, 0), (3, 3), (10**30, 261)])
def test_top_k_is_off_or_within_the_vocabulary(
    server: RunningServer, asked: int, meant: int
) -> None:
    assert params(server, top_k=asked).top_k == meant


def test_each_choice_has_a_seed_of_its_own() -> None:
    def seeds(seed: int | None) -> list[int | None]:
        first = SamplingParams(max_tokens=1, seed=seed)
        return [params_of_choice(first, choice).seed for choice in range(2)]

    assert seeds(7) == [7, 8]
    assert seeds(2**63 - 1) == [2**63 - 1, 0]
    assert seeds(-5) == [2**63 - 5, 2**63 - 4]
    assert seeds(None) == [None, None]
