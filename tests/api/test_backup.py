"""A backup of a server's adapters that is made while it runs, and a server on what is restored."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Place, Serve, text_of
from tests.api.stores import place as place
from tests.api.stores import serve as serve


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
