"""A server whose adapters are in a bucket, also while that bucket is away."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.api.oracle import upload
from tests.api.test_streaming import COMPLETIONS
from tests.bad_s3 import bad_s3

ADAPTERS = "/v1/adapters"


@pytest.fixture
def serve(s3: str, model_folder: Path, tmp_path: Path) -> Callable[..., object]:
    """A client of a server on the bucket, with a cache of some name."""

    @contextmanager
    def serve(cache: str) -> Iterator[httpx.Client]:
        settings = Settings(
            model=str(model_folder),
            served_model_name="tiny",
            adapters_dir=s3,
            adapters_cache_dir=tmp_path / cache,
        )
        with run_server(settings) as (url, _), httpx.Client(base_url=url, timeout=60) as client:
            yield client

    return serve


def complete(client: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "The order arrived", "max_tokens": 4, "temperature": 0}
    return client.post(COMPLETIONS, json=body)


def test_an_adapter_in_a_bucket_is_served_and_found_by_the_next_server(
    serve: Callable[..., object], adapter_folders: dict[str, Path]
) -> None:
    folder = adapter_folders["mlp"]
    with serve("here") as client:
        assert upload(client, "mine", folder).status_code == 201
        text = complete(client, "mine").json()["choices"][0]["text"]
    with serve("there") as client:
        assert complete(client, "mine").json()["choices"][0]["text"] == text
        file = client.get(f"{ADAPTERS}/mine/files/adapter_model.safetensors").content
        assert file == (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.fault(
    "bucket",
    "A server's bucket refuses everything, or is full",
    by="a proxy before the bucket",
    promise="Changes are 503 or 507, what is here is served; when it works again, changes are "
    "taken.",
)
def test_while_the_bucket_is_away_changes_are_503_and_what_is_here_is_served(
    serve: Callable[..., object],
    s3_server: str,
    adapter_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bad_s3(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with serve("here") as client:
            assert upload(client, "mine", adapter_folders["mlp"]).status_code == 201
            proxy.always("refuses")
            for answer in (
                upload(client, "other", adapter_folders["queries"]),
                client.patch(f"{ADAPTERS}/mine", json={"description": "x"}),
                client.delete(f"{ADAPTERS}/mine"),
            ):
                assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
                assert answer.json()["error"]["code"] == "storage_unavailable"
            assert complete(client, "mine").status_code == 200
            proxy.always("is full")
            assert upload(client, "other", adapter_folders["queries"]).status_code == 507
            proxy.always(None)
            assert upload(client, "other", adapter_folders["queries"]).status_code == 201
            assert client.delete(f"{ADAPTERS}/mine").status_code == 204
