"""Running requests when adapters change, the queue fills, or the server stops."""

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from infuse.server.api import logprobs
from infuse.server.services import Services
from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle, upload
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, Chunk, at_rest, eventually

StartServer = Callable[..., tuple[str, Services]]
LONG: dict[str, Any] = {
    "prompt": "The order arrived",
    "temperature": 0,
    "ignore_eos": True,
    "max_tokens": 200,
}


def events(response: httpx.Response) -> Generator[Chunk]:
    """A stream's chunks, up to `[DONE]`, which must come."""
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream broke off")


@pytest.fixture
def name(client: httpx.Client, adapter_folders: dict[str, Path]) -> Iterator[str]:
    """An adapter that a test may do with as it likes."""
    response = upload(client, "passing", adapter_folders["mlp"])
    assert response.status_code == 201, response.text
    yield "passing"
    client.delete("/v1/adapters/passing")


@pytest.fixture
def overflowing(
    client: httpx.Client, adapter_folders: dict[str, Path], tmp_path: Path
) -> Iterator[str]:
    """An adapter of finite values that drive the model's output beyond what floats hold."""
    folder = adapter_folders["mlp"]
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: torch.full_like(vector, 1e30) for key, vector in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    assert upload(client, "overflowing", tmp_path).status_code == 201
    yield "overflowing"
    client.delete("/v1/adapters/overflowing")


@pytest.mark.parametrize("change", ["replace", "delete"])
def test_a_running_stream_ends_on_the_revision_it_began_with(
    client: httpx.Client,
    server: RunningServer,
    adapter_folders: dict[str, Path],
    model_folder: Path,
    name: str,
    change: str,
) -> None:
    old = Oracle(model_folder, adapter_folders["mlp"])
    expected = old.text(old.greedy(LONG["prompt"], 200))

    with client.stream("POST", COMPLETIONS, json=LONG | {"model": name, "stream": True}) as answer:
        chunks = events(answer)
        text = next(chunks)["choices"][0]["text"]
        if change == "replace":
            folder = adapter_folders["queries"]
            assert upload(client, name, folder, method="PUT").status_code == 200
        else:
            assert client.delete(f"/v1/adapters/{name}").status_code == 204
        fingerprints = set()
        for chunk in chunks:
            text += chunk["choices"][0]["text"]
            fingerprints.add(chunk["system_fingerprint"])

    assert text == expected
    assert len(fingerprints) == 1
    after = client.post(COMPLETIONS, json=LONG | {"model": name, "max_tokens": 1})
    assert after.status_code == (200 if change == "replace" else 404)
    assert after.headers.get("infuse-adapter") != answer.headers["infuse-adapter"]
    assert eventually(lambda: at_rest(server))


@pytest.mark.native
def test_a_model_that_overflows_fails_its_own_request_only(
    client: httpx.Client, server: RunningServer, overflowing: str
) -> None:
    base = server.services.model_name
    undisturbed = client.post(COMPLETIONS, json=LONG | {"model": base}).json()["choices"]

    with client.stream("POST", COMPLETIONS, json=LONG | {"model": base, "stream": True}) as beside:
        chunks = events(beside)
        text = next(chunks)["choices"][0]["text"]
        failed = client.post(COMPLETIONS, json=LONG | {"model": overflowing, "n": 2})
        text += "".join(chunk["choices"][0]["text"] for chunk in chunks)

    assert failed.status_code == 500
    error = failed.json()["error"]
    assert error["type"] == "server_error"
    assert "not finite" in error["message"]
    assert text == undisturbed[0]["text"]
    assert eventually(lambda: at_rest(server))


@pytest.mark.native
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_failure_within_a_stream_is_an_event(
    client: httpx.Client, server: RunningServer, overflowing: str, path: str
) -> None:
    body = {"model": overflowing, "stream": True, "n": 2, **PROMPTS[path]}

    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        [event] = events(response)

    assert event["error"]["type"] == "server_error"
    assert "not finite" in event["error"]["message"]
    assert eventually(lambda: at_rest(server))


@pytest.mark.native
def test_a_failure_within_a_stream_has_the_form_of_its_api(
    client: httpx.Client, server: RunningServer, overflowing: str
) -> None:
    body = {"model": overflowing, "stream": True, **PROMPTS[CHAT]}
    anthropics = client.post("/v1/messages", json=body | {"max_tokens": 9})
    ollamas = client.post("/api/chat", json=body)

    *_, name, data = anthropics.text.strip().split("\n")
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (name, error["type"]) == ("event: error", "api_error")
    assert "not finite" in error["message"]
    assert "not finite" in json.loads(ollamas.text.splitlines()[-1])["error"]
    assert eventually(lambda: at_rest(server))


def test_a_full_queue_says_when_to_come_back(start_server: StartServer) -> None:
    url, services = start_server(max_batch_rows=1, max_queue=2)
    two = LONG | {"model": "tiny", "n": 2}

    with httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", COMPLETIONS, json=two | {"stream": True}) as response:
            chunks = events(response)
            next(chunks)
            whole = client.post(COMPLETIONS, json=two)
            stream = client.post(COMPLETIONS, json=two | {"stream": True})
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        later = client.post(COMPLETIONS, json=two)

    for refused in (whole, stream):
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) >= 1
    assert text
    assert later.status_code == 200
    assert eventually(lambda: services.engine.stats().waiting == 0)


def test_a_stopping_server_says_so_to_whom_it_cannot_finish(start_server: StartServer) -> None:
    url, services = start_server()
    body = LONG | {"model": "tiny"}

    with httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            chunks = events(response)
            next(chunks)
            services.engine.stop(timeout=0)
            *_, last = chunks
        refused = client.post(COMPLETIONS, json=body)

    assert last["error"]["type"] == "server_error"
    assert "shutting down" in last["error"]["message"]
    assert refused.status_code == 503
    assert last["error"]["code"] == refused.json()["error"]["code"] == "stopping"
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_cannot_be_written_keeps_nothing(
    client: httpx.Client,
    server: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    streamed: bool,
) -> None:
    monkeypatch.setattr(logprobs.TokenBytes, "__init__", lambda *_: 1 / 0)
    scored = {COMPLETIONS: {"logprobs": 1}, CHAT: {"logprobs": True}}[path]
    body = {"model": "default", "stream": streamed, **PROMPTS[path], **scored}

    assert client.post(path, json=body).status_code == 500
    assert eventually(lambda: at_rest(server))


@pytest.fixture
def model_with_template(model_folder: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """The tiny model with another chat template."""

    def change(template: str | None) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        (folder / "chat_template.jinja").unlink()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return change


def test_a_model_without_a_chat_template_completes_only(
    start_server: StartServer, model_with_template: Callable[[str | None], Path]
) -> None:
    url, _ = start_server(model=str(model_with_template(None)))

    refused = httpx.post(url + CHAT, json={"model": "tiny", **PROMPTS[CHAT]})
    answered = httpx.post(url + COMPLETIONS, json={"model": "tiny", **PROMPTS[COMPLETIONS]})

    assert refused.status_code == 400
    assert COMPLETIONS in refused.json()["error"]["message"]
    assert answered.status_code == 200


def test_what_a_chat_template_refuses_is_said(
    start_server: StartServer, model_with_template: Callable[[str | None], Path]
) -> None:
    template = (
        "{% for message in messages %}{% if message.role == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}{{ mood }}{{ message.name }}"
        "{{ message.content }}{% endfor %}"
    )
    url, services = start_server(model=str(model_with_template(template)))
    messages = [{"role": "user", "name": "Ada", "content": "Hi"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 1}

    result = {"role": "tool", "tool_call_id": "a", "content": "x"}

    named = httpx.post(url + CHAT, json=body | {"chat_template_kwargs": {"mood": "calm"}})
    tool = httpx.post(url + CHAT, json=body | {"messages": [result]})
    half = httpx.post(
        url + CHAT,
        content=json.dumps(body | {"chat_template_kwargs": {"mood": "\ud800"}}),
        headers={"content-type": "application/json"},
    )

    assert named.json()["usage"]["prompt_tokens"] == len("calmAdaHi")
    for refused in (tool, half):
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages"
    assert "no tools here" in tool.json()["error"]["message"]
    assert services.registry.stats().leases == 0
