"""`/v1/adapters` on a real server: add, list, look up, download and delete adapters."""

import json
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.api.archives import CONFIG, WEIGHTS, form_of, read_adapter, tar_of, zip_of
from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle, upload

ADAPTERS = "/v1/adapters"
PROMPT = {"prompt": "The order arrived", "temperature": 0, "ignore_eos": True, "max_tokens": 8}
PACKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zip_of,
    "tar": tar_of,
    "tar.gz": partial(tar_of, kind="w:gz"),
    "tar.bz2": partial(tar_of, kind="w:bz2"),
    "tar.xz": partial(tar_of, kind="w:xz"),
}


@pytest.fixture(autouse=True)
def _only_the_preloaded_stay(server: RunningServer) -> Iterator[None]:
    yield
    forget_uploads(server)


@pytest.fixture
def name() -> str:
    """A name that was never used."""
    return f"support-{uuid.uuid4().hex}"


@pytest.fixture
def mlp(adapter_folders: dict[str, Path]) -> Path:
    return adapter_folders["mlp"]


def forget_uploads(server: RunningServer) -> None:
    services = server.services
    for name in set(services.registry.stored.names()) - server.adapter_folders.keys():
        services.registry.delete(name)


def add_archive(client: httpx.Client, name: str, archive: bytes) -> httpx.Response:
    return client.post(ADAPTERS, data={"name": name}, files={"archive": archive})


def complete(client: httpx.Client, model: str) -> httpx.Response:
    return client.post("/v1/completions", json=PROMPT | {"model": model})


def stored(client: httpx.Client, name: str) -> dict[str, bytes]:
    files = {file: client.get(f"{ADAPTERS}/{name}/files/{file}") for file in (CONFIG, WEIGHTS)}
    assert {response.status_code for response in files.values()} == {200}
    return {file: response.content for file, response in files.items()}


# Adding


def test_an_upload_answers_with_the_adapter_and_where_it_is(
    client: httpx.Client, server: RunningServer, mlp: Path, name: str
) -> None:
    response = upload(client, name, mlp)

    assert response.status_code == 201
    assert response.headers["location"] == f"/v1/adapters/{name}"
    adapter = client.get(response.headers["location"])
    assert adapter.json() == response.json() | {"warnings": []}
    assert adapter.headers["etag"] == response.headers["etag"]
    said = response.json()
    assert (said["name"], said["revision"], said["unchanged"]) == (name, 1, False)
    assert said["parent"] == server.services.model_name
    assert said["size"] == sum(len(data) for data in read_adapter(mlp).values())
    assert response.headers["etag"] == f'"{said["revision"]}-{said["digest"][:32]}"'


def test_an_upload_answers_requests_at_once_as_peft_does(
    client: httpx.Client, model_folder: Path, mlp: Path, name: str
) -> None:
    oracle = Oracle(model_folder, mlp)
    upload(client, name, mlp)

    answer = complete(client, name)

    assert answer.headers["infuse-adapter"] == f"{name}@1"
    expected = oracle.text(oracle.greedy(PROMPT["prompt"], 8))
    assert answer.json()["choices"][0]["text"] == expected


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("folder", ["", "./", "my-adapter/", "a/b/c/"])
def test_an_archive_may_have_the_adapter_at_its_top_or_in_a_folder(
    client: httpx.Client, mlp: Path, kind: str, folder: str
) -> None:
    files = read_adapter(mlp)
    packed = PACKERS[kind]({folder + name: data for name, data in files.items()})

    response = add_archive(client, "packed", packed)

    assert response.status_code == 201, response.text
    assert stored(client, "packed") == files


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_what_else_lies_in_an_archive_is_passed_over(
    client: httpx.Client, server: RunningServer, mlp: Path, kind: str
) -> None:
    files = read_adapter(mlp)
    others = {"out/README.md": b"# Mine", "out/optimizer.pt": b"\x80", f"__MACOSX/._{CONFIG}": b""}
    packed = PACKERS[kind](others | {f"out/{name}": data for name, data in files.items()})

    add_archive(client, "packed", packed)

    store = server.services.registry.stored
    kept = store.files(store.current("packed"))
    assert {file.name for file in kept.iterdir()} == {"README.md", CONFIG, WEIGHTS}
    assert stored(client, "packed") == files


def test_the_folder_that_peft_wrote_may_be_packed_as_it_is(client: httpx.Client, mlp: Path) -> None:
    whole = {f"{mlp.name}/{file.name}": file.read_bytes() for file in mlp.iterdir()}

    assert add_archive(client, "packed", zip_of(whole)).status_code == 201


@pytest.mark.parametrize("name", ["a", "7", "A.b_c-D", "x" * 128, "v1..2"])
def test_a_name_has_letters_digits_dots_underscores_and_hyphens(
    client: httpx.Client, mlp: Path, name: str
) -> None:
    assert upload(client, name, mlp).status_code == 201
    assert complete(client, name).headers["infuse-adapter"] == f"{name}@1"


def test_a_taken_name_is_a_conflict_that_changes_nothing(
    client: httpx.Client, adapter_folders: dict[str, Path], name: str
) -> None:
    first = upload(client, name, adapter_folders["mlp"])

    second = upload(client, name, adapter_folders["queries"])

    assert second.status_code == 409
    assert second.json()["error"]["code"] == "adapter_exists"
    assert second.json()["error"]["param"] == "name"
    assert client.get(f"{ADAPTERS}/{name}").headers["etag"] == first.headers["etag"]


def test_no_adapter_takes_the_name_of_the_base(
    client: httpx.Client, server: RunningServer, mlp: Path
) -> None:
    base = server.services.model_name

    response = upload(client, base, mlp)

    assert response.status_code == 409
    assert client.get(f"{ADAPTERS}/{base}").status_code == 404
    assert "infuse-adapter" not in complete(client, base).headers


def test_an_adapter_of_another_base_is_taken_with_a_warning(
    client: httpx.Client, mlp: Path
) -> None:
    files = read_adapter(mlp)
    config = json.loads(files[CONFIG]) | {"base_model_name_or_path": "meta-llama/Llama-3.2-3B"}
    form = form_of(files | {CONFIG: json.dumps(config).encode()})

    response = client.post(ADAPTERS, data={"name": "stranger"}, files=form)

    assert response.status_code == 201
    [warning] = response.json()["warnings"]
    assert "meta-llama/Llama-3.2-3B" in warning


# Dry runs


@pytest.mark.parametrize("fields", [{}, {"name": "support"}])
def test_a_dry_run_says_what_fits_and_keeps_nothing(
    client: httpx.Client, mlp: Path, fields: dict[str, str]
) -> None:
    before = client.get(ADAPTERS).json()

    response = client.post(
        f"{ADAPTERS}?dry_run=true", data=fields, files=form_of(read_adapter(mlp))
    )

    assert response.status_code == 200
    assert "location" not in response.headers
    said = response.json()
    assert said["object"] == "adapter.check"
    assert said["targets"] == 4
    assert said["nbytes"] == 2 * (64 + 64) * 4
    assert client.get(ADAPTERS).json() == before


def test_a_dry_run_of_a_new_revision_keeps_the_old_one(
    client: httpx.Client, adapter_folders: dict[str, Path], name: str
) -> None:
    etag = upload(client, name, adapter_folders["mlp"]).headers["etag"]

    form = form_of(read_adapter(adapter_folders["queries"]))
    response = client.put(f"{ADAPTERS}/{name}?dry_run=1", files=form)

    assert response.json()["targets"] == 2
    assert client.get(f"{ADAPTERS}/{name}").headers["etag"] == etag


def test_a_dry_run_lists_the_faults_of_a_real_one(
    client: httpx.Client, mlp: Path, name: str
) -> None:
    form = form_of(read_adapter(mlp) | {CONFIG: b"{}"})

    dry = client.post(f"{ADAPTERS}?dry_run=true", files=form)
    real = client.post(ADAPTERS, data={"name": name}, files=form)

    assert dry.status_code == 400
    assert dry.json() == real.json()


# Listing


def test_a_list_comes_in_pages_in_order_of_names(client: httpx.Client, mlp: Path) -> None:
    for name in ("zeta", "Alpha", "beta", "beta-2"):
        upload(client, name, mlp)
    everything = [adapter["name"] for adapter in client.get(ADAPTERS).json()["data"]]

    pages, after = [], None
    while not pages or after is not None:
        query = {"limit": 3} | ({} if after is None else {"after": after})
        page = client.get(ADAPTERS, params=query).json()
        pages.append([adapter["name"] for adapter in page["data"]])
        after = page["next"]

    assert [len(page) for page in pages] == [3, 3, 1]
    assert [name for page in pages for name in page] == everything == sorted(everything)


def test_a_list_shows_each_adapter_as_it_is_alone(client: httpx.Client) -> None:
    listed = client.get(ADAPTERS).json()

    assert listed["object"] == "list"
    assert listed["next"] is None
    for adapter in listed["data"]:
        assert client.get(f"{ADAPTERS}/{adapter['name']}").json() == adapter


def test_a_page_after_the_last_name_is_empty(client: httpx.Client) -> None:
    assert client.get(f"{ADAPTERS}?after=~").json() == {"object": "list", "data": [], "next": None}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x"])
def test_a_page_of_an_impossible_size_is_refused(client: httpx.Client, query: str) -> None:
    response = client.get(f"{ADAPTERS}?{query}")

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "limit"


# Downloading


def test_what_is_downloaded_is_what_was_uploaded(
    client: httpx.Client, mlp: Path, name: str
) -> None:
    etag = upload(client, name, mlp).headers["etag"]

    assert stored(client, name) == read_adapter(mlp)
    config = client.get(f"{ADAPTERS}/{name}/files/{CONFIG}")
    assert config.headers["etag"] == etag
    assert CONFIG in config.headers["content-disposition"]


def test_a_part_of_a_file_can_be_downloaded(client: httpx.Client, mlp: Path) -> None:
    headers = {"Range": "bytes=4-9"}

    part = client.get(f"{ADAPTERS}/mlp/files/{WEIGHTS}", headers=headers)

    assert part.status_code == 206
    assert part.content == read_adapter(mlp)[WEIGHTS][4:10]


@pytest.mark.parametrize(
    ("part", "status"),
    [("bytes=99999999-", 416), ("bytes=9-4", 400), ("pages=1-2", 400), ("x", 400)],
)
def test_a_part_that_there_is_not_is_refused_like_everything_else(
    client: httpx.Client, part: str, status: int
) -> None:
    response = client.get(f"{ADAPTERS}/mlp/files/{WEIGHTS}", headers={"Range": part})

    assert response.status_code == status
    assert response.json()["error"]["param"] == "Range"
    assert ("content-range" in response.headers) == (status == 416)


def test_peft_loads_what_is_downloaded(
    client: httpx.Client, model_folder: Path, tmp_path: Path, mlp: Path, name: str
) -> None:
    upload(client, name, mlp)
    for file, data in stored(client, name).items():
        (tmp_path / file).write_bytes(data)
    base = LlamaForCausalLM.from_pretrained(model_folder)

    model = peft.PeftModel.from_pretrained(base, tmp_path)

    again, ids = Oracle(model_folder, mlp), [5, 6, 7]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0]
    torch.testing.assert_close(torch.log_softmax(logits, -1), again.scores(ids))


@pytest.mark.parametrize("file", ["optimizer.pt", "lock", "..%2F..%2Flock", "%2Fetc%2Fpasswd"])
def test_only_an_adapters_own_files_can_be_downloaded(
    client: httpx.Client, adapter_folders: dict[str, Path], file: str
) -> None:
    name = next(iter(adapter_folders))

    assert client.get(f"{ADAPTERS}/{name}/files/{file}").status_code in (400, 404)
