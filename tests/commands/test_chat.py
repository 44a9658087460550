"""`infuse chat`: at a terminal, and with a message that is piped in."""

import json
import re

import httpx
import pytest

from tests.api.test_streaming import eventually
from tests.commands.conftest import Infuse, Typed

pytestmark = pytest.mark.usefixtures("added")
SHORT = ("--temperature", 0, "--max-tokens", 4)


@pytest.fixture(autouse=True)
def _key(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Who chats may not administer."""
    monkeypatch.setenv("INFUSE_API_KEY", "the-key-of-generate")


def answered(server: str, **body: object) -> str:
    """What the API answers."""
    sent = {"temperature": 0, "max_tokens": 4, "model": "tiny"} | body
    headers = {"Authorization": "Bearer the-key-of-generate"}
    answer = httpx.post(f"{server}/v1/chat/completions", json=sent, headers=headers, timeout=60)
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_a_message_that_is_piped_in_is_answered_by_the_adapter(infuse: Infuse, server: str) -> None:
    given = {"input": "Hello,\nthere\n"}  # `echo` ends its line.
    plain = json.loads(infuse("chat", *SHORT, "--json", **given).stdout)
    one = json.loads(infuse("chat", "first", *SHORT, "--json", **given).stdout)
    some = json.loads(infuse("chat", "first=0.5", *SHORT, "--json", **given).stdout)
    mixed = json.loads(infuse("chat", "first=0.5", "second", *SHORT, "--json", **given).stdout)

    messages = user("Hello,\nthere")
    parts = [{"name": "first", "weight": 0.5}, {"name": "second"}]
    assert plain["content"] == answered(server, messages=messages)
    assert one["content"] == answered(server, messages=messages, model="first")
    assert some["content"] == answered(server, messages=messages, model="first", strength=0.5)
    assert mixed["content"] == answered(server, messages=messages, adapters=parts)
    assert mixed["model"] == "first=0.5 second"


def test_an_adapter_that_one_chats_with_is_counted_by_its_name(infuse: Infuse, server: str) -> None:
    def asked() -> float:
        headers = {"Authorization": "Bearer the-key-of-admin"}
        text = httpx.get(f"{server}/metrics", headers=headers).text
        return sum(map(float, re.findall(r'^infuse_requests_total{.*"first".*} (\S+)', text, re.M)))

    before = asked()
    infuse("chat", "first", *SHORT, input="A")

    assert eventually(lambda: asked() > before)


def test_a_conversation_changes_whom_it_is_with(typed: Typed) -> None:
    lines = ("/adapters", "/use first", "A", "/use nobody", "B", "/nonsense", "/use a=b", "/quit")
    shown = typed("chat", *SHORT, lines=lines)

    assert "first\r\nsecond\r\n" in shown
    assert "tiny> " in shown
    assert "first> " in shown
    assert "nobody> " in shown
    assert "There is no model 'nobody'; /adapters lists them" in shown
    assert "There is no command /nonsense; /help lists them." in shown
    assert "'b' is no weight" in shown


def test_what_was_said_before_counts_until_a_new_conversation(typed: Typed, server: str) -> None:
    lines = ("A", "B", "/new", "C", "/system T", "D", "/quit")
    shown = typed("chat", *SHORT, "--json", "--system", "S", lines=lines)
    first, second, third, last = (
        json.loads(line)["content"] for line in re.findall(r"{.*}", shown)
    )

    system = {"role": "system", "content": "S"}
    before = [system, *user("A"), {"role": "assistant", "content": first}]
    assert first == answered(server, messages=[system, *user("A")])
    assert second == answered(server, messages=[*before, *user("B")])
    assert third == answered(server, messages=[system, *user("C")])
    assert last == answered(server, messages=[{"role": "system", "content": "T"}, *user("D")])


def test_a_message_to_nobody_ends_a_script_with_the_reason(infuse: Infuse) -> None:
    refused = infuse("chat", "nobody", input="A")

    assert refused.exit_code == 1
    assert refused.stderr == (
        "There is no model 'nobody'; infuse adapters list shows the adapters\n"
    )
