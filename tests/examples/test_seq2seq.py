"""A T5 adapter trained by the example's script answers as PEFT does."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from examples.train import seq2seq
from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.engine.family_oracle import FamilyOracle
from tests.factories import tiny_tokenizer
from tests.families import tiny

PROMPTS = ["one two", "the last of nine", "x"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5 whose tokenizer ends each text, as T5's own does."""
    folder = tmp_path_factory.mktemp("base") / "tiny-t5"
    tiny("t5", initializer_factor=1.0).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "reverse"
    data = folder.parent / "pairs.jsonl"
    words = ["one", "two", "nine", "the", "last"]
    pairs = [{"input": word, "output": word[::-1]} for word in words]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = ["--model", str(base), "--data", str(data), "--output", str(folder)]
    seq2seq.main([*arguments, "--steps", "30", "--batch", "4", "--learning-rate", "0.05"])
    data.unlink()
    return folder


@pytest.fixture(scope="module")
def client(
    base: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    settings = Settings(
        model=str(base),
        served_model_name="t5",
        adapters_dir=tmp_path_factory.mktemp("store"),
        preload_adapters=trained.parent,
    )
    with (
        run_server(settings) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def text_of_peft(base: Path, adapter: Path | None, prompt: str, tokens: int = 12) -> str:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSeq2SeqLM.from_pretrained(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        answer = model.eval().generate(
            **tokenizer(prompt, return_tensors="pt"), max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(answer[0], skip_special_tokens=True))


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("model", ["t5", "reverse"])
def test_an_encoder_decoder_answers_with_pefts_text(
    client: httpx.Client, base: Path, trained: Path, model: str, prompt: str
) -> None:
    answer = client.post(
        "/v1/completions",
        json={"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0},
    ).json()

    adapter = None if model == "t5" else trained
    assert answer["choices"][0]["text"] == text_of_peft(base, adapter, prompt)


def test_training_changed_what_the_model_says(base: Path, trained: Path) -> None:
    assert any(text_of_peft(base, trained, p) != text_of_peft(base, None, p) for p in PROMPTS)


def test_many_prompts_stream_from_one_batch(
    client: httpx.Client, base: Path, trained: Path
) -> None:
    """Prompts of unequal length, whose decoders start together."""
    answer = client.post(
        "/v1/completions",
        json={"model": "reverse", "prompt": PROMPTS, "max_tokens": 12, "temperature": 0},
    ).json()

    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [text_of_peft(base, trained, prompt) for prompt in PROMPTS]
    assert answer["usage"]["prompt_tokens"] == sum(len(prompt) + 1 for prompt in PROMPTS)


def test_the_prompt_and_the_answer_have_a_window_each(client: httpx.Client) -> None:
    """512 tokens: the prompt's come with an end token."""
    fits = {"model": "t5", "prompt": "x" * 511, "max_tokens": 60, "temperature": 0}
    assert client.post("/v1/completions", json=fits).status_code == 200

    refusal = client.post("/v1/completions", json=fits | {"prompt": "x" * 512})
    assert refusal.status_code == 400
    assert refusal.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("limit", [0, 5])
def test_the_tokens_of_an_encoders_prompt_are_not_scored(client: httpx.Client, limit: int) -> None:
    refusal = client.post(
        "/v1/completions",
        json={"model": "t5", "prompt": "x", "echo": True, "logprobs": 1, "max_tokens": limit},
    )

    assert refusal.status_code == 400
    assert "/v1/rank" in refusal.json()["error"]["message"]


@pytest.mark.parametrize("model", ["t5", "reverse"])
def test_choices_are_ranked_by_the_decoders_log_probabilities(
    client: httpx.Client, base: Path, trained: Path, model: str
) -> None:
    """One long prompt, which its choices share, and a short one; of the choice's tokens and its
    end token, as in T-Few."""
    inputs = [
        {"prompt": "a text of more than thirty-two tokens", "choices": ["eno", "owt", "x"]},
        {"prompt": "one", "choices": ["eno", "a longer choice"]},
    ]
    answer = client.post("/v1/rank", json={"model": model, "inputs": inputs}).json()

    tokenizer = AutoTokenizer.from_pretrained(base)
    oracle = FamilyOracle(
        AutoModelForSeq2SeqLM.from_pretrained(base), [] if model == "t5" else [trained]
    )
    for asked, ranking in zip(inputs, answer["data"], strict=True):
        for choice, ranked in zip(asked["choices"], ranking["choices"], strict=True):
            target = tokenizer.encode(choice)
            logprobs = oracle.logprobs(tokenizer.encode(asked["prompt"]), target)
            by_token = logprobs[range(len(target)), target]
            assert ranked["tokens"] == len(choice) + 1
            assert ranked["score"] == pytest.approx(by_token.mean().item(), abs=1e-4)


def test_samples_of_one_prompt_share_its_encoding(client: httpx.Client, base: Path) -> None:
    body = {"model": "t5", "prompt": "x" * 40, "max_tokens": 6, "temperature": 0, "n": 3}
    choices = client.post("/v1/completions", json=body).json()["choices"]

    assert {choice["text"] for choice in choices} == {text_of_peft(base, None, "x" * 40, 6)}


def test_a_model_without_a_chat_template_says_what_to_use(client: httpx.Client) -> None:
    refusal = client.post(
        "/v1/chat/completions",
        json={"model": "t5", "messages": [{"role": "user", "content": "hello"}]},
    )

    assert refusal.status_code == 400
    assert "/v1/completions" in refusal.json()["error"]["message"]
