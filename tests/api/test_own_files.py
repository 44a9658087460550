"""A harmful tokenizer or chat template harms its adapter's requests only."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from transformers import AutoTokenizer

from infuse.adapters.storage.store import AdapterStore
from infuse.adapters.vocabulary import sandbox
from infuse.adapters.vocabulary.sandbox import Limits
from infuse.server.client import Client, ClientError
from infuse.server.services import Services
from tests.adapters.vocabulary.test_sandbox import RUNAWAYS, processes
from tests.adapters.vocabulary.test_vocabulary import aborts, panics, replaces
from tests.api.conftest import RunningServer
from tests.factories import CHAT_TEMPLATE

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "what time is it?"}]
LONGER = [*MESSAGES, {"role": "assistant", "content": "noon"}, *MESSAGES]
LOOPS = RUNAWAYS["two loops"]
Change = Callable[[dict[str, Any]], None]
Messages = list[dict[str, str]]
StartServer = Callable[..., tuple[str, Services]]


@pytest.fixture(autouse=True)
def _low_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(1, 100, 128 << 20))
    monkeypatch.setattr(sandbox, "TOKENIZER", Limits(4, 30, 256 << 20))


@pytest.fixture
def admin(server: RunningServer) -> Iterator[Client]:
    with Client(server.base_url, None) as admin:
        yield admin


@pytest.fixture
def bringing(server: RunningServer, tmp_path: Path) -> Callable[..., Path]:
    """An adapter with a chat template, or with the base's tokenizer as it is changed."""

    def bringing(template: str = "", change: Change | None = None) -> Path:
        folder = tmp_path / f"brings-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(server.adapter_folders["default"], folder)
        if template:
            (folder / "chat_template.jinja").write_text(template)
        if change is not None:
            AutoTokenizer.from_pretrained(server.model_folder).save_pretrained(folder)
            text = json.loads((folder / "tokenizer.json").read_text())
            change(text)
            (folder / "tokenizer.json").write_text(json.dumps(text))
        return folder

    return bringing


def ask(client: httpx.Client, model: str, messages: Messages = MESSAGES) -> httpx.Response:
    return client.post(
        CHAT, json={"model": model, "messages": messages, "max_tokens": 4, "temperature": 0}
    )


def test_an_adapter_that_is_deleted_while_its_template_is_read_is_not_found(
    client: httpx.Client,
    admin: Client,
    bringing: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admin.add("brief", str(bringing(CHAT_TEMPLATE + "{# brief #}")))
    read = Path.read_bytes

    def delete_and_read(path: Path) -> bytes:
        if path.name == "chat_template.jinja":
            client.delete("/v1/adapters/brief")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", delete_and_read)

    assert ask(client, "brief").status_code == 404


@pytest.mark.parametrize("change", [replaces, panics, aborts])
def test_a_tokenizer_that_does_something_else_is_refused_at_the_upload(
    client: httpx.Client,
    admin: Client,
    bringing: Callable[..., Path],
    change: Change,
) -> None:
    before = ask(client, "tiny").json()["choices"]

    with pytest.raises(ClientError, match=r"tokenizer\.json: .*add_tokens"):
        admin.add("other", str(bringing(change=change)))

    assert ask(client, "tiny").json()["choices"] == before
    assert ask(client, "other").status_code == 404


@pytest.mark.parametrize("kind", ["two loops", "a power that is folded", "a string that doubles"])
def test_a_template_that_runs_away_is_refused_at_the_upload(
    client: httpx.Client, admin: Client, bringing: Callable[..., Path], kind: str
) -> None:
    with pytest.raises(ClientError, match=r"chat_template\.jinja: .* takes more than"):
        admin.add("other", str(bringing(RUNAWAYS[kind])))

    assert ask(client, "tiny").status_code == 200


def test_a_template_that_runs_away_later_ends_its_own_requests_only(
    client: httpx.Client, admin: Client, bringing: Callable[..., Path]
) -> None:
    late = "{% if messages | length > 1 %}" + LOOPS + "{% endif %}" + CHAT_TEMPLATE
    admin.add("late", str(bringing(late)))
    admin.add("sane", str(bringing(CHAT_TEMPLATE + " ")))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    assert ask(client, "late").status_code == 200
    with ThreadPoolExecutor(5) as others:
        ends = [others.submit(ask, client, "late", LONGER) for _ in range(5)]
        for model in ("tiny", "sane", "tiny"):
            assert ask(client, model).status_code == 200
        assert not all(each.done() for each in ends)
        answers = [each.result() for each in ends]
    body = {"model": "late", "messages": MESSAGES, "tools": tools}
    written = client.post(CHAT, json=body)
    admin.remove("late")
    admin.remove("sane")

    for answer in answers:
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert "it takes more than 1 seconds of CPU time" in error["message"]
        assert error["param"] == "messages"
    assert written.status_code == 400
    assert "no place for tools" in written.json()["error"]["message"]


@pytest.mark.parametrize("change", [replaces, panics, aborts])
def test_what_an_earlier_version_stored_is_refused_by_its_requests(
    start_server: StartServer,
    bringing: Callable[..., Path],
    change: Change,
    tmp_path: Path,
) -> None:
    store = AdapterStore(tmp_path / "store")
    with store.staging() as staged:
        shutil.copytree(bringing(change=change), staged, dirs_exist_ok=True)
        store.create("old", staged)
    store.close()
    url, _ = start_server(adapters_dir=tmp_path / "store")

    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(2):
            refused = ask(client, "old")
            assert refused.status_code == 400
            assert refused.json()["error"]["message"].startswith("tokenizer.json: ")
        assert ask(client, "tiny").status_code == 200


def test_uploads_that_are_slow_to_read_hold_up_no_other_route(
    start_server: StartServer, bringing: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than routes have threads."""
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(60, 60, 128 << 20))
    url, services = start_server()
    folder = str(bringing(CHAT_TEMPLATE + " "))
    with Client(url, None) as admin, httpx.Client(base_url=url, timeout=60) as client:
        admin.add("first", folder)
        ours = [each for each in processes() if each.ppid() == os.getpid()]
        parent = max(ours, key=lambda each: each.create_time())
        slow = [str(bringing(CHAT_TEMPLATE + "  " + " " * number)) for number in range(44)]
        with ThreadPoolExecutor(44) as others:
            parent.suspend()
            try:
                names = [f"slow-{number}" for number in range(44)]
                ends = [others.submit(admin.add, *each) for each in zip(names, slow, strict=True)]
                while services.staging.statistics().tasks_waiting < 36:
                    assert not any(each.done() for each in ends)
                    time.sleep(0.01)
                assert client.get("/v1/adapters").status_code == 200
                assert ask(client, "first").status_code == 200
            finally:
                parent.resume()
            for each in ends:
                each.result()


def test_an_ordinary_adapter_starts_no_process(
    start_server: StartServer, server: RunningServer
) -> None:
    url, _ = start_server()
    before = set(psutil.Process().children())
    with Client(url, None) as admin, httpx.Client(base_url=url, timeout=60) as client:
        admin.add("plain", str(server.adapter_folders["default"]))
        assert ask(client, "plain").status_code == 200
        assert ask(client, "tiny").status_code == 200

    assert set(psutil.Process().children()) <= before
