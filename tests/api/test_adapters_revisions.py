"""How an adapter is changed and deleted: revisions, ETags, and what requests see of it."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter, zip_of
from tests.api.conftest import RunningServer, run_server
from tests.api.oracle import Oracle, upload
from tests.api.test_adapters import ADAPTERS, PROMPT, complete, forget_uploads, stored
from tests.api.test_adapters import name as name

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _only_the_preloaded_stay(server: RunningServer) -> Iterator[None]:
    yield
    forget_uploads(server)


@pytest.fixture
def mlp(adapter_folders: dict[str, Path]) -> Path:
    return adapter_folders["mlp"]


@pytest.fixture
def queries(adapter_folders: dict[str, Path]) -> Path:
    return adapter_folders["queries"]


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


def expected(model_folder: Path, adapter: Path) -> str:
    oracle = Oracle(model_folder, adapter)
    return oracle.text(oracle.greedy(PROMPT["prompt"], PROMPT["max_tokens"]))


# Replacing


def test_a_replaced_adapter_answers_as_its_new_revision(
    client: httpx.Client, model_folder: Path, mlp: Path, queries: Path, name: str
) -> None:
    old = upload(client, name, mlp)

    new = upload(client, name, queries, method="PUT")

    assert new.status_code == 200
    assert (new.json()["revision"], new.json()["unchanged"]) == (2, False)
    assert new.headers["etag"] != old.headers["etag"]
    answer = complete(client, name)
    assert answer.headers["infuse-adapter"] == f"{name}@2"
    assert text_of(answer) == expected(model_folder, queries)
    assert stored(client, name) == read_adapter(queries)


def test_an_old_revision_answers_to_its_number(
    client: httpx.Client, model_folder: Path, mlp: Path, queries: Path, name: str
) -> None:
    upload(client, name, mlp)
    upload(client, name, queries, method="PUT")

    answer = complete(client, f"{name}@1")

    assert answer.headers["infuse-adapter"] == f"{name}@1"
    assert text_of(answer) == expected(model_folder, mlp)


def test_putting_the_same_content_again_changes_nothing_and_says_so(
    client: httpx.Client, mlp: Path, name: str
) -> None:
    first = upload(client, name, mlp)

    again = upload(client, name, mlp, method="PUT")

    assert again.status_code == 200
    assert again.json() == first.json() | {"unchanged": True}
    assert again.headers["etag"] == first.headers["etag"]
    assert complete(client, f"{name}@2").status_code == 404


def test_a_new_revision_may_come_as_an_archive(
    client: httpx.Client, mlp: Path, queries: Path, name: str
) -> None:
    upload(client, name, mlp)

    packed = zip_of(read_adapter(queries))
    response = client.put(f"{ADAPTERS}/{name}", files={"archive": packed})

    assert response.json()["revision"] == 2
    assert stored(client, name) == read_adapter(queries)


def test_an_unknown_adapter_cannot_be_replaced(client: httpx.Client, mlp: Path, name: str) -> None:
    response = upload(client, name, mlp, method="PUT")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"
    assert client.get(f"{ADAPTERS}/{name}").status_code == 404


def test_a_bad_new_revision_leaves_the_old_one_in_place(
    client: httpx.Client, mlp: Path, name: str
) -> None:
    etag = upload(client, name, mlp).headers["etag"]

    bad = form_of(read_adapter(mlp) | {WEIGHTS: b"nothing"})
    response = client.put(f"{ADAPTERS}/{name}", files=bad)

    assert response.status_code == 400
    assert client.get(f"{ADAPTERS}/{name}").headers["etag"] == etag
    assert complete(client, name).headers["infuse-adapter"] == f"{name}@1"


# If-Match


def test_an_etag_of_before_does_not_replace(
    client: httpx.Client, mlp: Path, queries: Path, name: str
) -> None:
    stale = upload(client, name, mlp).headers["etag"]
    current = upload(client, name, queries, method="PUT").headers["etag"]

    response = client.put(
        f"{ADAPTERS}/{name}", files=form_of(read_adapter(mlp)), headers={"If-Match": stale}
    )

    assert response.status_code == 412
    assert response.headers["etag"] == current
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("revision_conflict", "If-Match")
    assert client.get(f"{ADAPTERS}/{name}").json()["revision"] == 2


def test_an_etag_of_before_does_not_delete(client: httpx.Client, mlp: Path, name: str) -> None:
    current = upload(client, name, mlp).headers["etag"]

    response = client.delete(f"{ADAPTERS}/{name}", headers={"If-Match": '"stale"'})

    assert response.status_code == 412
    assert response.headers["etag"] == current
    assert complete(client, name).status_code == 200


@pytest.mark.parametrize("match", ["current", "*"])
def test_the_current_etag_or_a_star_replaces_and_deletes(
    client: httpx.Client, mlp: Path, queries: Path, name: str, match: str
) -> None:
    etag = upload(client, name, mlp).headers["etag"]
    for folder in (queries, mlp):
        headers = {"If-Match": etag if match == "current" else match}
        replaced = client.put(
            f"{ADAPTERS}/{name}", files=form_of(read_adapter(folder)), headers=headers
        )
        assert replaced.status_code == 200
        etag = replaced.headers["etag"]

    headers = {"If-Match": etag if match == "current" else match}
    assert client.delete(f"{ADAPTERS}/{name}", headers=headers).status_code == 204


# Deleting


def test_a_deleted_adapter_is_gone_everywhere(client: httpx.Client, mlp: Path, name: str) -> None:
    upload(client, name, mlp)

    response = client.delete(f"{ADAPTERS}/{name}")

    assert (response.status_code, response.content) == (204, b"")
    assert name not in [adapter["name"] for adapter in client.get(ADAPTERS).json()["data"]]
    assert name not in [model["id"] for model in client.get("/v1/models").json()["data"]]
    form = form_of(read_adapter(mlp))
    for gone in (
        client.get(f"{ADAPTERS}/{name}"),
        client.get(f"{ADAPTERS}/{name}/files/{CONFIG}"),
        client.put(f"{ADAPTERS}/{name}", files=form),
        client.delete(f"{ADAPTERS}/{name}"),
        client.get(f"/v1/models/{name}"),
    ):
        assert gone.status_code == 404


@pytest.mark.parametrize("suffix", ["", "@1"])
@pytest.mark.parametrize("used", [False, True])
def test_a_deleted_adapter_is_never_answered_by_the_base(
    client: httpx.Client, mlp: Path, name: str, suffix: str, used: bool
) -> None:
    upload(client, name, mlp)
    if used:
        complete(client, name)
    client.delete(f"{ADAPTERS}/{name}")

    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    for answer in (
        complete(client, name + suffix),
        client.post(CHAT, json=chat | {"model": name + suffix}),
    ):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_a_name_that_comes_back_goes_on_counting(
    client: httpx.Client, mlp: Path, queries: Path, name: str
) -> None:
    upload(client, name, mlp)
    upload(client, name, queries, method="PUT")
    client.delete(f"{ADAPTERS}/{name}")

    back = upload(client, name, mlp)

    assert (back.status_code, back.json()["revision"]) == (201, 3)
    assert complete(client, name).headers["infuse-adapter"] == f"{name}@3"
    for old in (f"{name}@1", f"{name}@2"):
        assert complete(client, old).status_code == 404


def test_two_names_of_one_content_live_apart(
    client: httpx.Client, server: RunningServer, mlp: Path, name: str
) -> None:
    twin = f"{name}-twin"
    etags = {upload(client, each, mlp).headers["etag"] for each in (name, twin)}
    texts = {text_of(complete(client, each)) for each in (name, twin)}

    client.delete(f"{ADAPTERS}/{name}")

    assert len(etags) == len(texts) == 1
    assert {text_of(complete(client, twin))} == texts
    assert stored(client, twin) == read_adapter(mlp)
    assert server.services.registry.stats().leases == 0


def test_the_base_cannot_be_deleted_or_replaced(
    client: httpx.Client, server: RunningServer, mlp: Path
) -> None:
    base = server.services.model_name

    assert client.delete(f"{ADAPTERS}/{base}").status_code == 404
    assert upload(client, base, mlp, method="PUT").status_code == 404
    assert complete(client, base).status_code == 200


# Surviving


def test_a_restarted_server_has_every_adapter_as_it_was(
    model_folder: Path, mlp: Path, queries: Path, tmp_path: Path
) -> None:
    settings = Settings(model=str(model_folder), served_model_name="tiny", adapters_dir=tmp_path)
    with run_server(settings) as (url, _), httpx.Client(base_url=url) as client:
        for name in ("kept", "deleted"):
            upload(client, name, mlp)
        upload(client, "kept", queries, method="PUT")
        client.delete(f"{ADAPTERS}/deleted")
        before, texts = client.get(ADAPTERS).json(), [text_of(complete(client, "kept@1"))]

    with run_server(settings) as (url, _), httpx.Client(base_url=url) as client:
        texts.append(text_of(complete(client, "kept@1")))
        assert client.get(ADAPTERS).json() == before
        assert texts[0] == texts[1]
        assert complete(client, "deleted").status_code == 404
        assert upload(client, "deleted", mlp).json()["revision"] == 2


def test_with_keep_days_a_server_drops_what_was_replaced_long_ago(
    tmp_path: Path, model_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    settings = Settings(model=str(model_folder), adapters_dir=tmp_path, keep_days=1)
    with run_server(settings) as (url, _), httpx.Client(base_url=url) as client:
        upload(client, "mine", adapter_folders["mlp"])
        upload(client, "mine", adapter_folders["queries"], "PUT")
        assert numbers(client) == [2, 1]
    journal = tmp_path / "journal.jsonl"
    today = f'"created":"{datetime.now(UTC):%Y-%m-%d}'
    assert today in journal.read_text()
    journal.write_text(journal.read_text().replace(today, '"created":"2025-01-01'))
    with run_server(settings) as (url, _), httpx.Client(base_url=url) as client:
        while numbers(client) != [2]:
            pass
        assert client.get("/v1/adapters/mine").json()["revision"] == 2


def numbers(client: httpx.Client) -> list[int]:
    revisions = client.get("/v1/adapters/mine/revisions").json()["data"]
    return [each["revision"] for each in revisions]
