"""The folder of the adapters, or of the merges, is removed while the server runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.archives import form_of, read_adapter
from tests.api.conftest import run_server
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Place, Serve, complete, error_of, text_of
from tests.api.stores import serve as serve


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path, None)


TAKEN: dict[str, Callable[[Path], object]] = {
    "removed": shutil.rmtree,
    "moved": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "journal removed": lambda folder: (folder / "journal.jsonl").unlink(),
}


@pytest.mark.fault(
    "disk",
    "The adapters' folder is removed",
    by="`rm -r` while the server runs",
    promise="Changes and `/health/ready` are 503 with what to do; what is in memory is served.",
    case="[removed",
)
@pytest.mark.fault(
    "disk",
    "The adapters' folder is moved",
    by="`mv` while the server runs",
    promise="As where it is removed.",
    case="moved",
)
@pytest.mark.fault(
    "disk",
    "The journal is removed",
    by="`rm` while the server runs",
    promise="As where the folder is removed.",
    case="journal removed",
)
@pytest.mark.parametrize("how", TAKEN)
def test_every_change_is_refused_and_ready_says_why(
    serve: Serve, place: Place, adapter_folders: dict[str, Path], how: str
) -> None:
    form = form_of(read_adapter(adapter_folders["queries"]))
    path = f"{ADAPTERS}/mine"
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        upload(client, "mine", adapter_folders["default"], "PUT")
        text = text_of(client, "mine")
        assert client.get("/health/ready").status_code == 200
        TAKEN[how](place.folder)
        for answer in (
            client.post(ADAPTERS, data={"name": "new"}, files=form),
            client.put(path, files=form),
            client.patch(path, json={"description": "x"}),
            client.post(f"{path}/rollback", json={"revision": 1}),
            client.delete(path),
            client.get("/health/ready"),
        ):
            error = error_of(answer, 503)
            assert error["code"] == "storage_unavailable"
            assert str(place.folder) in error["message"]
            assert "restart" in error["message"]
            assert "Retry-After" in answer.headers
        assert client.get("/health/live").status_code == 200
        assert [each["name"] for each in client.get(ADAPTERS).json()["data"]] == ["mine"]
        assert client.get(path).json()["revision"] == 2
        assert text_of(client, "mine") == text
        if how == "removed":
            assert error_of(complete(client, "mine@1"), 503)["code"] == "storage_unavailable"
            assert not client.get(path).json()["damaged"]


@pytest.mark.fault(
    "disk",
    "The adapters' folder is away and comes back",
    by="`mv` there and back",
    promise="Changes are taken again without a restart, and last.",
)
def test_a_folder_that_was_put_back_takes_changes_again(
    serve: Serve, place: Place, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        place.folder.rename(place.folder.with_name("elsewhere"))
        assert client.get("/health/ready").status_code == 503
        assert complete(client, "mine").status_code == 503
        place.folder.with_name("elsewhere").rename(place.folder)
        assert client.get("/health/ready").status_code == 200
        assert complete(client, "mine").status_code == 200
        assert client.patch(f"{ADAPTERS}/mine", json={"description": "x"}).status_code == 200
    with serve() as client:
        assert client.get(f"{ADAPTERS}/mine").json()["description"] == "x"


@pytest.mark.fault(
    "disk",
    "The merges' folder is removed",
    by="`mv` while the server runs",
    promise="Merges are refused with 503; the folder is not made again.",
)
def test_no_merge_is_taken_into_a_folder_that_is_gone(
    serve: Serve, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    with serve() as client:
        upload(client, "mine", adapter_folders["mlp"])
        merge = {"adapter": "mine"}
        (tmp_path / "merges").rename(tmp_path / "elsewhere")
        error = error_of(client.post("/v1/merges", json=merge), 503)
        assert str(tmp_path / "merges") in error["message"]
        assert client.get("/v1/merges").json()["data"] == []
        (tmp_path / "elsewhere").rename(tmp_path / "merges")
        job = client.post("/v1/merges", json=merge)
        assert job.status_code == 202
        (tmp_path / "merges").rename(tmp_path / "elsewhere")
        assert client.delete(f"/v1/merges/{job.json()['id']}").status_code == 503
        assert not (tmp_path / "merges").exists()
        (tmp_path / "elsewhere").rename(tmp_path / "merges")


@pytest.mark.fault(
    "disk",
    "The local copies of a bucket are removed",
    by="`rm -r` while the server runs",
    promise="They are fetched again; nobody notices.",
)
def test_a_bucket_s_copies_may_go_at_any_time(
    s3: str, tmp_path: Path, model_folder: Path, adapter_folders: dict[str, Path]
) -> None:

    place = Place(tmp_path, s3)
    settings = Settings(model=str(model_folder), served_model_name="tiny", **place.settings)
    with run_server(settings) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
        upload(client, "mine", adapter_folders["mlp"])
        shutil.rmtree(place.cache)
        assert client.get("/health/ready").status_code == 200
        assert complete(client, "mine").status_code == 200
        assert upload(client, "new", adapter_folders["queries"]).status_code == 201
