"""A backup of a server's adapters that is made while it runs, and a server on what is restored."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from infuse.server.cli import app
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Place, Serve, text_of
from tests.api.stores import place as place
from tests.api.stores import serve as serve
from tests.releases import REPOSITORY
from tests.served import served_by

INFUSE = [sys.executable, "-c", "from infuse.server.cli import main; main()"]


@pytest.mark.parametrize("to", ["folder", "bucket"])
def test_a_server_on_what_was_restored_answers_as_the_first_one_did(
    serve: Serve, place: Place, adapter_folders: dict[str, Path], tmp_path: Path, s3: str, to: str
) -> None:
    saved = str(tmp_path / "saved") if to == "folder" else f"{s3}-saved"
    again = str(tmp_path / "again") if to == "folder" else f"{s3}-again"
    live = ["--adapters-dir", str(place.settings["adapters_dir"])]
    with serve() as client:
        upload(client, "support", adapter_folders["mlp"])
        first = text_of(client, "support")
        upload(client, "support", adapter_folders["queries"], "PUT")
        upload(client, "gone", adapter_folders["mlp"])
        client.delete(f"{ADAPTERS}/gone")
        expected = text_of(client, "support")
        assert CliRunner().invoke(app, ["backup", saved, *live]).exit_code == 0
    assert CliRunner().invoke(app, ["restore", saved, "--adapters-dir", again]).exit_code == 0
    anew = {"adapters_dir": again, "adapters_cache_dir": tmp_path / "another cache"}
    with serve(**anew) as client:
        assert text_of(client, "support") == expected
        assert text_of(client, "support@1") == first
        names = [each["name"] for each in client.get(ADAPTERS).json()["data"]]
        assert names == ["support"]


def test_an_empty_machine_with_nothing_but_the_backup_answers_as_the_first_one_did(
    model_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path
) -> None:
    """By the commands alone, with a home and a folder that were empty. The base model is not in a
    backup."""
    first, backup, second = (tmp_path / name for name in ("first", "backup", "second"))
    with machine(first, model_folder) as client:
        upload(client, "support", adapter_folders["mlp"])
        before = text_of(client, "support")
        upload(client, "support", adapter_folders["queries"], "PUT")
        client.patch(f"{ADAPTERS}/support", json={"description": "For support", "pinned": True})
        shown = client.get(f"{ADAPTERS}/support").json()
        now = text_of(client, "support")
        infuse(first, "backup", backup)
    shutil.rmtree(first)

    second.mkdir()
    infuse(second, "restore", backup)
    shutil.rmtree(backup)
    with machine(second, model_folder) as client:
        assert client.get(f"{ADAPTERS}/support").json() == shown
        assert text_of(client, "support") == now
        assert text_of(client, "support@1") == before
        assert upload(client, "support", adapter_folders["mlp"], "PUT").json()["revision"] == 3
    assert "4 events are as they were recorded" in infuse(second, "audit", "verify")


@contextmanager
def machine(home: Path, model: Path) -> Iterator[httpx.Client]:
    """A client of a server that has its home to itself; it stops with the block."""
    home.mkdir(exist_ok=True)
    flags = ["--port=0", f"--model={model}", "--served-model-name=tiny", "--max-batch-rows=4"]
    served = served_by([*INFUSE, "serve", *flags], home / "log", home, environment(home))
    with served as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def infuse(home: Path, *words: object) -> str:
    command = [*INFUSE, *map(str, words)]
    env = os.environ | environment(home)
    return subprocess.run(
        command, cwd=home, env=env, check=True, capture_output=True, text=True
    ).stdout


def environment(home: Path) -> dict[str, str]:
    return {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
