"""Any text in any field of an admin request, a config or a generation request: it is taken, and
given back as it was, or it is a 400; and what was refused has changed nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter, zip_of
from tests.api.conftest import RunningServer
from tests.api.test_adapters import ADAPTERS, forget_uploads

NASTY = [
    "\ud800",
    "a\udfffb",
    "\udc00\ud800",
    "\0",
    "\x1b[2J\x07",
    "a\r\nSet-Cookie: b",
    "\u202eabc\u2066",
    "\ufeff\ufffe\uffff",
    "\U0010ffff",
    "x" * 300_000,
    "é" * 5000,
    "",
    "../../etc/passwd",
    "%2F%00",
    "{{ 7 * 7 }}",
]
ANY_TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=()), max_size=8),
    st.text(st.characters(categories=("Cs", "Cc", "Cf")), min_size=1, max_size=3),
)


def is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def state(client: httpx.Client) -> object:
    """Everything that a change would change."""
    answer = client.get(ADAPTERS, params={"limit": 1000})
    assert answer.status_code == 200, answer.text
    adapters = answer.json()["data"]
    etags = [client.get(f"{ADAPTERS}/{each['name']}").headers["etag"] for each in adapters]
    return adapters, etags, client.get("/v1/merges").json()["data"]


def post(client: httpx.Client, method: str, path: str, body: Any) -> httpx.Response:
    # Half a surrogate pair goes as \\ud800: so does what any client escapes.
    content = json.dumps(body).encode()
    return client.request(
        method, path, content=content, headers={"Content-Type": "application/json"}
    )


def with_config(files: dict[str, bytes], **fields: Any) -> dict[str, bytes]:
    config = json.loads(files[CONFIG]) | fields
    return files | {CONFIG: json.dumps(config).encode()}


JSON_REQUESTS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "description": ("PATCH", f"{ADAPTERS}/mlp", lambda text: {"description": text}),
    "tags": ("PATCH", f"{ADAPTERS}/mlp", lambda text: {"tags": ["a", text]}),
    "unknown field": ("PATCH", f"{ADAPTERS}/mlp", lambda text: {text: text}),
    "source": ("POST", ADAPTERS, lambda text: {"name": "new", "source": text}),
    "file source": ("POST", ADAPTERS, lambda text: {"name": "new", "source": f"file:///{text}"}),
    "hub source": ("PUT", f"{ADAPTERS}/mlp", lambda text: {"source": f"hf://a/b@{text}"}),
    "name": ("POST", ADAPTERS, lambda text: {"name": text, "source": "hf://a/b"}),
    "combined name": (
        "POST",
        f"{ADAPTERS}/combine",
        lambda text: {"name": text, "adapters": [{"name": "mlp"}], "method": "linear"},
    ),
    "combined of": (
        "POST",
        f"{ADAPTERS}/combine",
        lambda text: {"name": "new", "adapters": [{"name": text}], "method": "linear"},
    ),
    "method": (
        "POST",
        f"{ADAPTERS}/combine",
        lambda text: {"name": "new", "adapters": [{"name": "mlp"}], "method": text},
    ),
    "revision": ("POST", f"{ADAPTERS}/mlp/rollback", lambda text: {"revision": text}),
    "merged": ("POST", "/v1/merges", lambda text: {"adapter": f"{text}@1"}),
    "composition": (
        "POST",
        "/v1/merges",
        lambda text: {"adapters": [{"name": "nobody"}], "composition": text},
    ),
    "model": ("POST", "/v1/completions", lambda text: {"model": text, "prompt": "x"}),
    "mixed": (
        "POST",
        "/v1/completions",
        lambda text: {"model": "tiny", "prompt": "x", "adapters": [{"name": text}]},
    ),
    "user": (
        "POST",
        "/v1/completions",
        lambda text: {"model": "mlp", "prompt": "x", "max_tokens": 1, "user": text, text: text},
    ),
    "ranked model": (
        "POST",
        "/v1/rank",
        lambda text: {"model": text, "inputs": [{"prompt": "x", "choices": ["a"]}]},
    ),
}


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT, which=st.sampled_from(sorted(JSON_REQUESTS)))
def test_any_text_in_a_json_request_is_taken_whole_or_refused(
    client: httpx.Client, server: RunningServer, text: str, which: str
) -> None:
    forget_uploads(server)
    before = state(client)
    method, path, body = JSON_REQUESTS[which]
    answer = post(client, method, path, body(text))
    assert answer.status_code < 500 or answer.json()["error"]["code"] == "source_failed"
    answer.json()
    after = state(client)
    if answer.is_success and method == "PATCH":
        said = client.get(f"{ADAPTERS}/mlp").json()
        assert is_whole(text)
        assert text in (said["description"], *said["tags"])
    elif not answer.is_success:
        assert after == before


CONFIG_FIELDS = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "own field")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=ANY_TEXT,
    field=st.sampled_from(CONFIG_FIELDS),
    packed=st.booleans(),
    dry_run=st.booleans(),
)
def test_any_text_in_a_config_is_taken_whole_or_refused(
    client: httpx.Client,
    server: RunningServer,
    adapter_folders: dict[str, Path],
    text: str,
    field: str,
    packed: bool,
    dry_run: bool,
) -> None:
    forget_uploads(server)
    before = state(client)
    value: Any = {"own field": {text: [text]}, "auto_mapping": {"a": text}}.get(field, text)
    files = with_config(read_adapter(adapter_folders["mlp"]), **{field: value})
    parts = {"archive": zip_of(files)} if packed else form_of(files)
    query = {"dry_run": str(dry_run).lower()}
    answer = client.post(ADAPTERS, params=query, data={"name": "new"}, files=parts)
    if is_whole(text):
        assert answer.status_code == (200 if dry_run else 201), answer.text
    else:
        assert answer.status_code == 400, answer.text
        [fault] = answer.json()["error"]["details"]
        assert fault["field"] == field
    assert (state(client) == before) == (dry_run or answer.status_code == 400)
    if answer.status_code == 201:
        assert client.get(f"{ADAPTERS}/new/files/{CONFIG}").json()[field] == value


def as_json(field: str, value: Any) -> bytes:
    return json.dumps({field: value}).encode()


TEXT_FILES: dict[str, tuple[str, Callable[[str], bytes]]] = {
    "readme": ("README.md", lambda text: text.encode(errors="surrogatepass")),
    "template": ("tokenizer_config.json", lambda text: as_json("chat_template", text)),
    "end": ("tokenizer_config.json", lambda text: as_json("eos_token", text)),
    "special": (
        "tokenizer_config.json",
        lambda text: as_json("additional_special_tokens", [text, {"content": text}]),
    ),
    "padding": ("special_tokens_map.json", lambda text: as_json("pad_token", text)),
    "template's own file": (
        "chat_template.jinja",
        lambda text: text.encode(errors="surrogatepass"),
    ),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY_TEXT, which=st.sampled_from(sorted(TEXT_FILES)))
def test_any_text_in_a_file_beside_is_taken_or_refused(
    client: httpx.Client,
    server: RunningServer,
    adapter_folders: dict[str, Path],
    text: str,
    which: str,
) -> None:
    forget_uploads(server)
    before = state(client)
    file, written = TEXT_FILES[which]
    files = read_adapter(adapter_folders["mlp"]) | {file: written(text)}
    answer = client.post(ADAPTERS, data={"name": "new"}, files={"archive": zip_of(files)})
    assert answer.status_code in (201, 400), answer.text
    assert (state(client) == before) == (answer.status_code == 400)
    if answer.status_code == 201:
        chat = {"model": "new", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=chat).status_code in (200, 400)


@pytest.mark.parametrize("text", NASTY, ids=lambda text: ascii(text)[:20])
def test_any_text_in_a_form_is_taken_or_refused(
    client: httpx.Client, server: RunningServer, adapter_folders: dict[str, Path], text: str
) -> None:
    forget_uploads(server)
    before = state(client)
    config, weights = (adapter_folders["mlp"] / name for name in (CONFIG, WEIGHTS))
    raw = text.encode(errors="surrogatepass")
    for name, file in ((raw, b"a"), (b"new\xff", b"a"), (b"new", raw.replace(b"\r\n", b""))):
        parts = [b'Content-Disposition: form-data; name="name"\r\n\r\n' + name]
        for field, path in (("config", config), ("weights", weights)):
            head = b'Content-Disposition: form-data; name="%s"; filename="' % field.encode()
            parts.append(head + file + b'"\r\n\r\n' + path.read_bytes())
        body = b"".join(b"--xyz\r\n" + part + b"\r\n" for part in parts) + b"--xyz--\r\n"
        kind = {"Content-Type": "multipart/form-data; boundary=xyz"}
        answer = client.post(ADAPTERS, content=body, headers=kind)
        assert answer.status_code in (201, 400), answer.text
        assert (state(client) == before) == (answer.status_code == 400)
        forget_uploads(server)
