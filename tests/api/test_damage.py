"""A revision whose stored files are not those that were uploaded is never served."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.archives import CONFIG, WEIGHTS, zip_of
from tests.api.oracle import upload
from tests.api.stores import (
    ADAPTERS,
    Place,
    Serve,
    complete,
    damaged_in_metrics,
    error_of,
    flipped,
    text_of,
)
from tests.api.stores import place as place
from tests.api.stores import serve as serve


def messages(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}


def assert_damaged(answer: httpx.Response, revision: str) -> None:
    error = error_of(answer, 500)
    assert (error["code"], error["type"]) == ("adapter_damaged", "server_error")
    assert f"'{revision}' are damaged" in error["message"]
    assert "upload the same files again" in error["message"]
    assert "roll back" in error["message"]


@pytest.mark.fault(
    "disk",
    "Bits of stored weights flip",
    by="the file, on the disk and in the bucket",
    promise="The damaged adapter answers 500 `adapter_damaged` on every route that reads it and is "
    "never served; all others are.",
)
def test_flipped_bytes_are_found_after_a_restart_wherever_they_are_read(
    serve: Serve, place: Place, adapter_folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with serve() as client:
        upload(client, "other", adapter_folders["queries"])
        right = text_of(client, "other")
        base = text_of(client, "tiny")
    place.change(WEIGHTS, flipped)
    with serve() as client:
        for name in ("mine", "twin"):
            upload(client, name, adapter_folders["mlp"])
        assert text_of(client, "mine") not in (base, right)
        for _ in range(2):
            assert_damaged(complete(client, "other"), "other@1")
        assert_damaged(complete(client, "other@1"), "other@1")
        assert_damaged(client.post("/v1/chat/completions", json=messages("other")), "other@1")
        mixed = {"model": "tiny", "prompt": "x", "adapters": [{"name": "mine"}, {"name": "other"}]}
        assert_damaged(client.post("/v1/completions", json=mixed), "other@1")
        ranked = {"model": "other", "inputs": [{"prompt": "x", "choices": ["a", "b"]}]}
        assert_damaged(client.post("/v1/rank", json=ranked), "other@1")
        for file in (CONFIG, WEIGHTS):
            assert_damaged(client.get(f"{ADAPTERS}/other/files/{file}"), "other@1")
        recipe = {"name": "new", "adapters": [{"name": "other"}], "method": "linear"}
        assert_damaged(client.post(f"{ADAPTERS}/combine", json=recipe), "other@1")
        assert_damaged(client.post("/v1/merges", json={"adapter": "other"}), "other@1")
        assert_damaged(client.patch(f"{ADAPTERS}/other", json={"pinned": True}), "other@1")
        assert client.get(f"{ADAPTERS}/new").status_code == 404

        said = client.get(f"{ADAPTERS}/other").json()
        assert (said["damaged"], said["pinned"]) == (True, False)
        assert client.get(f"{ADAPTERS}/other/revisions").json()["data"][0]["damaged"]
        assert not client.get(f"{ADAPTERS}/mine").json()["damaged"]
        assert damaged_in_metrics(client) == 1
        assert caplog.text.count("'other@1' are damaged") == 1
        assert client.get("/health/ready").status_code == 200
        assert text_of(client, "tiny") == base


def test_the_same_upload_heals_it_and_nothing_else_does(
    serve: Serve, place: Place, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        right = text_of(client, "mine")
        etag = client.get(f"{ADAPTERS}/mine").headers["etag"]
    place.change(WEIGHTS, flipped)
    with serve() as client:
        assert_damaged(complete(client, "mine"), "mine@1")
        upload(client, "mine", adapter_folders["queries"], "PUT")
        assert_damaged(complete(client, "mine@1"), "mine@1")
        back = client.post(f"{ADAPTERS}/mine/rollback", json={"revision": 1})
        assert_damaged(back, "mine@1")
        assert client.get(f"{ADAPTERS}/mine").json()["revision"] == 2
        assert complete(client, "mine").status_code == 200
        assert damaged_in_metrics(client) == 1

        healed = upload(client, "mine", adapter_folders["mlp"], "PUT").json()
        assert (healed["revision"], healed["unchanged"], healed["damaged"]) == (3, False, False)
        assert text_of(client, "mine") == text_of(client, "mine@1") == right
        assert damaged_in_metrics(client) == 0
    with serve() as client:
        assert text_of(client, "mine@1") == right
        assert client.get(f"{ADAPTERS}/mine").headers["etag"] != etag


@pytest.mark.parametrize("seen", [True, False])
def test_putting_the_current_content_again_writes_its_files_where_they_are_damaged(
    serve: Serve, place: Place, adapter_folders: dict[str, Path], seen: bool
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        right = text_of(client, "mine")
    place.change(WEIGHTS, flipped)
    with serve() as client:
        if seen:
            assert_damaged(complete(client, "mine"), "mine@1")
        healed = upload(client, "mine", adapter_folders["mlp"], "PUT").json()
        assert (healed["revision"], healed["unchanged"], healed["damaged"]) == (1, False, False)
        assert text_of(client, "mine") == right
        assert upload(client, "mine", adapter_folders["mlp"], "PUT").json()["unchanged"]


def test_a_pinned_adapter_that_is_damaged_costs_no_start(
    serve: Serve, place: Place, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        client.patch(f"{ADAPTERS}/mine", json={"pinned": True})
        right = text_of(client, "mine")
    place.change(WEIGHTS, flipped)
    with serve() as client:
        assert damaged_in_metrics(client) == 1
        assert_damaged(complete(client, "mine"), "mine@1")
        assert upload(client, "mine", adapter_folders["mlp"], "PUT").json()["pinned"]
        assert text_of(client, "mine") == right


@pytest.mark.fault(
    "disk",
    "A stored tokenizer changes while its adapter is in memory",
    by="the file, on the disk and in the bucket",
    promise="It is 500 `adapter_damaged`.",
)
def test_a_tokenizer_that_was_changed_is_found_where_the_vectors_are_in_memory(
    serve: Serve, place: Place, adapter_folders: dict[str, Path]
) -> None:
    """A mixture with one part reads the adapter's tokenizer, and finds its own vectors."""
    files = {name: (adapter_folders["mlp"] / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    template = json.dumps({"chat_template": "{{ messages[0]['content'] }}!"}).encode()
    with serve() as client:
        packed = {"archive": zip_of(files | {"tokenizer_config.json": template})}
        assert client.post(ADAPTERS, data={"name": "mine"}, files=packed).status_code == 201
    place.change("tokenizer_config.json", lambda data: data.replace(b"!", b"?"))
    with serve() as client:
        assert_damaged(client.post("/v1/chat/completions", json=messages("mine")), "mine@1")
