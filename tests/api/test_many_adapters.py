"""Hundreds of adapters in one folder: only what a request needs is read from the disk.

`benchmarks/registry.py` measures 10,000.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from infuse.adapters.storage.store import AdapterStore
from infuse.server.services import Services

COUNT = 250

StartServer = Callable[..., tuple[str, Services]]


def name_of(number: int) -> str:
    return f"adapter-{number:03}"


@pytest.fixture
def many(tmp_path: Path, adapter_folders: dict[str, Path]) -> Path:
    """A folder with hundreds of adapters, each with a content of its own."""
    folder = tmp_path / "many"
    files = {file.name: file.read_bytes() for file in adapter_folders["default"].iterdir()}
    store = AdapterStore(folder)
    for number in range(COUNT):
        with store.staging() as staged:
            for name, data in files.items():
                more = b" " * number if name == "adapter_config.json" else b""
                (staged / name).write_bytes(data + more)
            store.create(name_of(number), staged)
    store.close()
    return folder


@contextmanager
def opened_below(folder: Path) -> Iterator[list[Path]]:
    """The files in it that this process opens meanwhile."""
    paths: list[Path] = []
    listening = True

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str):
            path = Path(arguments[0])
            if folder in path.parents:
                paths.append(path)

    sys.addaudithook(hook)
    try:
        yield paths
    finally:
        # Python keeps a hook for good.
        listening = False


@pytest.mark.native
def test_start_up_and_lists_read_no_adapter(many: Path, start_server: StartServer) -> None:
    with opened_below(many / "content") as read:
        url, _ = start_server(adapters_dir=many)
        page = httpx.get(f"{url}/v1/adapters?limit=100&after={name_of(99)}").json()
        models = httpx.get(f"{url}/v1/models").json()
        one = httpx.get(f"{url}/v1/adapters/{name_of(7)}").json()

    assert read == []
    assert [each["name"] for each in page["data"]] == [name_of(n) for n in range(100, 200)]
    assert page["next"] == name_of(199)
    assert len(models["data"]) == COUNT + 1
    assert one["revision"] == 1


def test_a_request_reads_its_adapter_once_and_only_the_first_time(
    many: Path, start_server: StartServer
) -> None:
    url, _ = start_server(adapters_dir=many)
    body = {"model": name_of(3), "prompt": "a", "max_tokens": 1}
    with opened_below(many / "content") as cold:
        httpx.post(f"{url}/v1/completions", json=body).raise_for_status()
    with opened_below(many / "content") as warm:
        httpx.post(f"{url}/v1/completions", json=body).raise_for_status()

    # All of them make the digest that is checked, the README too.
    [folder] = {path.parent for path in cold}
    assert sorted(path.name for path in cold) == sorted(file.name for file in folder.iterdir())
    assert warm == []


def test_an_upload_reads_no_other_adapter(
    many: Path, start_server: StartServer, adapter_folders: dict[str, Path]
) -> None:
    url, _ = start_server(adapters_dir=many)
    folder = adapter_folders["default"]
    files = {
        "config": (folder / "adapter_config.json").read_bytes() + b" " * COUNT,
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    with opened_below(many / "content") as read:
        answer = httpx.post(f"{url}/v1/adapters", data={"name": "new"}, files=files)

    assert answer.status_code == 201
    assert read == []
