"""Adapters with whole modules, a tokenizer and a chat template of their own, over HTTP."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from infuse.server.client import Client, ClientError
from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle
from tests.factories import TOKENS, save_adapter

of_whole_modules = pytest.mark.native
"""vLLM cannot serve such adapters: they are refused at the upload."""

NEW_TOKENS = ["<tool>", "<answer>", "<end>"]
TEMPLATE = (
    "<s>{% for message in messages %}<tool>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "what time is it?"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "skip_special_tokens": False}


@pytest.fixture(scope="module")
def grown(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with three tokens more, their embeddings, and a template that writes them."""
    folder = tmp_path_factory.mktemp("grown") / "grown"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(NEW_TOKENS, special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    save_adapter(larger(model_folder), folder, modules_to_save=["embed_tokens", "lm_head"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_head(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    folder = tmp_path_factory.mktemp("head") / "head"
    return save_adapter(base, folder, seed=9, modules_to_save=["lm_head", "model.norm"])


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Client]:
    with Client(server.base_url, None) as admin:
        yield admin


@pytest.fixture
def copied(grown: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(grown, tmp_path / "copied"))


def larger(model_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.resize_token_embeddings(TOKENS + len(NEW_TOKENS), mean_resizing=False)
    return model.eval()


def greedy(model: torch.nn.Module, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        ids = [*ids, int(logits.argmax())]
    return ids[-count:]


@of_whole_modules
def test_an_adapter_with_its_own_head_answers_as_peft_from_upload_to_deletion(
    client: httpx.Client,
    admin: Client,
    server: RunningServer,
    with_head: Path,
) -> None:
    body = {"model": "headed", "prompt": "once upon", **GREEDY}

    def answer() -> str:
        return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])

    def expected(folder: Path) -> str:
        oracle = Oracle(server.model_folder, folder)
        return str(oracle.tokenizer.decode(oracle.greedy("once upon", 12)))

    admin.add("headed", str(with_head))
    assert answer() == expected(with_head)
    admin.replace("headed", str(server.adapter_folders["default"]))
    assert answer() == expected(server.adapter_folders["default"])
    admin.roll_back("headed", 1)
    assert answer() == expected(with_head)
    assert server.services.registry.stats().saved_bytes > 0
    admin.remove("headed")
    assert client.post("/v1/completions", json=body).status_code == 404
    assert server.services.registry.stats().saved_bytes == 0


@of_whole_modules
def test_a_deleted_adapter_finishes_its_running_stream_on_its_own_head(
    client: httpx.Client, admin: Client, server: RunningServer, with_head: Path
) -> None:
    admin.add("leaving", str(with_head))
    body = {**GREEDY, "model": "leaving", "prompt": "once upon", "max_tokens": 60, "stream": True}
    text = ""
    with client.stream("POST", "/v1/completions", json=body) as stream:
        for number, line in enumerate(line for line in stream.iter_lines() if line):
            if number == 0:
                admin.remove("leaving")
            if line != "data: [DONE]":
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]

    oracle = Oracle(server.model_folder, with_head)
    assert text == oracle.tokenizer.decode(oracle.greedy("once upon", 60))


@of_whole_modules
def test_a_chat_with_added_tokens_is_pefts_and_leaves_others_alone(
    client: httpx.Client, admin: Client, server: RunningServer, grown: Path
) -> None:
    admin.add("grown", str(grown))
    body = {"model": "grown", "messages": MESSAGES, "logprobs": True, **GREEDY}
    answer = client.post("/v1/chat/completions", json=body).json()
    of_base = client.post("/v1/chat/completions", json=body | {"model": "tiny"}).json()
    admin.remove("grown")

    tokenizer = AutoTokenizer.from_pretrained(grown)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert {TOKENS, TOKENS + 1} <= set(ids)
    model = PeftModel.from_pretrained(larger(server.model_folder), grown).eval()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    expected = greedy(model, ids, 12)
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(expected)
    assert len(answer["choices"][0]["logprobs"]["content"]) == 12
    oracle = Oracle(server.model_folder)
    text = oracle.tokenizer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    ids = oracle.tokenizer.encode(text, add_special_tokens=False)
    expected = oracle.greedy(ids, 12)
    assert of_base["choices"][0]["message"]["content"] == oracle.tokenizer.decode(expected)


@of_whole_modules
def test_added_tokens_can_be_asked_for_by_id_and_by_bias_on_their_adapter_only(
    client: httpx.Client, admin: Client, grown: Path
) -> None:
    admin.add("asked", str(grown))
    body = {**GREEDY, "model": "asked", "prompt": [TOKENS + 2], "logit_bias": {str(TOKENS): 100}}
    answer = client.post("/v1/completions", json=body).json()
    refused = client.post("/v1/completions", json=body | {"model": "tiny"})
    admin.remove("asked")

    assert answer["choices"][0]["text"] == "<tool>" * 12
    assert refused.status_code == 400


@of_whole_modules
def test_a_constrained_answer_is_written_in_the_bases_tokens(
    client: httpx.Client, admin: Client, grown: Path
) -> None:
    admin.add("held", str(grown))
    body = {"model": "held", "prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}

    answer = client.post("/v1/completions", json=body).json()
    admin.remove("held")

    assert answer["choices"][0]["text"] in {"yes", "no"}


def test_a_chat_template_alone_is_enough_to_have_ones_own(
    client: httpx.Client, admin: Client, server: RunningServer, tmp_path: Path
) -> None:
    folder = shutil.copytree(server.adapter_folders["default"], tmp_path / "templated")
    (folder / "chat_template.jinja").write_text("Q: {{ messages[0]['content'] }} A:")
    admin.add("templated", str(folder))
    body = {"model": "templated", "messages": MESSAGES, **GREEDY}
    answer = client.post("/v1/chat/completions", json=body).json()
    half = client.post("/v1/chat/completions", json=body | {"strength": 0.5}).json()
    served = client.get("/v1/adapters/templated/files/chat_template.jinja")
    missing = client.get("/v1/adapters/templated/files/tokenizer.json")
    admin.remove("templated")

    oracle = Oracle(server.model_folder, folder)
    ids = oracle.tokenizer.encode("Q: what time is it? A:", add_special_tokens=False)
    text = oracle.tokenizer.decode(oracle.greedy(ids, 12))
    assert answer["choices"][0]["message"]["content"] == text
    assert half["usage"]["prompt_tokens"] == len(ids)
    assert served.text == "Q: {{ messages[0]['content'] }} A:"
    assert missing.status_code == 404


def test_the_bases_own_tokenizer_beside_an_adapter_changes_nothing(
    admin: Client, server: RunningServer, tmp_path: Path
) -> None:
    folder = shutil.copytree(server.adapter_folders["default"], tmp_path / "same")
    AutoTokenizer.from_pretrained(server.model_folder).save_pretrained(folder)
    admin.add("same", str(folder))
    with server.services.registry.lease("same") as lease:
        assert lease.vocabulary is None
    admin.remove("same")


@of_whole_modules
def test_an_adapters_own_end_token_ends_its_answers(
    client: httpx.Client, admin: Client, copied: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied)
    tokenizer.eos_token = "<end>"
    tokenizer.save_pretrained(copied)
    admin.add("ending", str(copied))
    bias = {str(TOKENS + 2): 100}
    body = {"model": "ending", "prompt": "x", "max_tokens": 5, "logit_bias": bias}
    answer = client.post("/v1/completions", json=body).json()
    admin.remove("ending")
    assert answer["usage"]["completion_tokens"] == 1
    assert answer["choices"][0]["finish_reason"] == "stop"


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def tokens_moved(folder: Path) -> None:
    text = json.loads((folder / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    (folder / "tokenizer.json").write_text(json.dumps(text))


def too_many_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def broken_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")


@of_whole_modules
@pytest.mark.parametrize(
    ("spoil", "file", "problem"),
    [
        (without_tokenizer, "tokenizer.json", "is missing: the adapter has 264 embeddings"),
        (tokens_moved, "tokenizer.json", "gives them other ids"),
        (too_many_tokens, "tokenizer.json", "has a token 264, and there are 264 embeddings"),
        (broken_tokenizer, "tokenizer.json", "is no tokenizer"),
        (broken_config, "tokenizer_config.json", "is no JSON object"),
        (broken_template, "chat_template.jinja", "cannot be compiled"),
    ],
)
def test_texts_that_do_not_fit_are_refused(
    admin: Client, copied: Path, spoil: Callable[[Path], None], file: str, problem: str
) -> None:
    spoil(copied)
    with pytest.raises(ClientError) as refusal:
        admin.add("spoilt", str(copied))
    assert file in str(refusal.value)
    assert problem in str(refusal.value)


@of_whole_modules
def test_modules_beyond_the_budget_are_refused_with_the_setting(
    start_server: Callable[..., Any], with_head: Path
) -> None:
    url, _ = start_server(max_saved_module_bytes=1000)
    with Client(url, None) as admin, pytest.raises(ClientError) as refusal:
        admin.add("large", str(with_head))
    assert f"take {(TOKENS + 1) * 32 * 4} bytes, and this server has room for 1000" in str(
        refusal.value
    )
    assert "max-saved-module-bytes" in str(refusal.value)


@of_whole_modules
def test_whole_modules_are_not_mixed(client: httpx.Client, admin: Client, with_head: Path) -> None:
    admin.add("whole", str(with_head))
    parts = [{"name": "whole"}, {"name": "default"}]
    mixed = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "adapters": parts})
    half = client.post("/v1/completions", json={"model": "whole", "prompt": "x", "strength": 0.5})
    recipe = {"name": "new", "adapters": parts, "method": "linear"}
    combined = client.post("/v1/adapters/combine", json=recipe)
    admin.remove("whole")
    for answer in (mixed, half, combined):
        assert answer.status_code == 400
        assert "brings its own copy of" in answer.json()["error"]["message"]
