"""Adapters that are added at start, and names that would mean two things."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infuse.adapters.errors import BaseNameTaken
from infuse.server.cli import app
from tests.api.oracle import upload
from tests.api.stores import ADAPTERS, Serve, complete, error_of, text_of
from tests.api.stores import place as place
from tests.api.stores import serve as serve


@pytest.fixture
def offered(tmp_path: Path, adapter_folders: dict[str, Path]) -> Path:
    """A folder with the adapters a and b."""
    for name in "ab":
        shutil.copytree(adapter_folders["mlp"], tmp_path / "offered" / name)
    return tmp_path / "offered"


def test_what_an_operator_deleted_stays_deleted(
    serve: Serve, offered: Path, adapter_folders: dict[str, Path]
) -> None:
    with serve(preload_adapters=offered) as client:
        assert client.delete(f"{ADAPTERS}/a").status_code == 204
    shutil.rmtree(offered / "a")
    shutil.copytree(adapter_folders["queries"], offered / "a")
    for _ in range(2):
        with serve(preload_adapters=offered) as client:
            assert client.get(f"{ADAPTERS}/a").status_code == 404
            assert error_of(complete(client, "a"), 404)
            assert client.get(f"{ADAPTERS}/b").json()["revision"] == 1
    with serve(preload_adapters=offered) as client:
        # Who wants it back adds it: then it is that operator's.
        assert upload(client, "a", adapter_folders["mlp"]).json()["revision"] == 2
    with serve(preload_adapters=offered) as client:
        assert client.get(f"{ADAPTERS}/a").json()["revision"] == 2


def test_what_an_operator_changed_stays_so_and_the_rest_is_brought_up_to_date(
    serve: Serve, offered: Path, adapter_folders: dict[str, Path]
) -> None:
    with serve(preload_adapters=offered) as client:
        upload(client, "a", adapter_folders["default"], "PUT")
        client.patch(f"{ADAPTERS}/b", json={"enabled": False, "description": "x"})
        replaced = text_of(client, "a")
    for name in "ab":
        shutil.rmtree(offered / name)
        shutil.copytree(adapter_folders["queries"], offered / name)
    with serve(preload_adapters=offered) as client:
        assert text_of(client, "a") == replaced
        b = client.get(f"{ADAPTERS}/b").json()
        assert (b["revision"], b["enabled"], b["description"]) == (2, False, "x")
        assert client.post(f"{ADAPTERS}/a/rollback", json={"revision": 1}).status_code == 200
    with serve(preload_adapters=offered) as client:
        assert client.get(f"{ADAPTERS}/a").json()["revision"] == 3


def test_a_folder_of_folders_offers_names_with_an_owner(
    serve: Serve, offered: Path, adapter_folders: dict[str, Path]
) -> None:
    shutil.copytree(adapter_folders["queries"], offered / "my-org" / "support")
    with serve(preload_adapters=offered) as client:
        names = [each["name"] for each in client.get(ADAPTERS).json()["data"]]
        assert names == ["a", "b", "my-org/support"]
        assert complete(client, "my-org/support").headers["infuse-adapter"] == "my-org/support@1"


@pytest.mark.parametrize("base", ["a", "my-org/a", "a@1"])
def test_a_base_is_not_served_under_the_name_of_an_adapter(
    serve: Serve, adapter_folders: dict[str, Path], base: str
) -> None:
    name = base.partition("@")[0]
    with serve() as client:
        assert upload(client, name, adapter_folders["mlp"]).status_code == 201
    problem = rf"there is an adapter '{name}': .*served-model-name"
    with pytest.raises(BaseNameTaken, match=problem), serve(served_model_name=base):
        pass
    with serve() as client:
        assert client.delete(f"{ADAPTERS}/{name}").status_code == 204
    with serve(served_model_name=base) as client:
        assert error_of(upload(client, name, adapter_folders["mlp"]), 409)
        assert complete(client, base).status_code == 200


def test_nor_under_the_name_of_one_that_is_offered(serve: Serve, offered: Path) -> None:
    settings = {"served_model_name": "a", "preload_adapters": offered}
    with pytest.raises(BaseNameTaken, match="rename that folder"), serve(**settings):
        pass


def test_nor_where_that_is_the_model_s_own_name(
    serve: Serve, model_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    with serve(served_model_name="other") as client:
        assert upload(client, model_folder.name, adapter_folders["mlp"]).status_code == 201
    with pytest.raises(BaseNameTaken, match=model_folder.name), serve(served_model_name=None):
        pass


def test_a_base_with_an_adapter_s_name_is_one_line(
    model_folder: Path, offered: Path, tmp_path: Path
) -> None:
    settings = {"--model": model_folder, "--adapters-dir": tmp_path / "store", "--port": 0}
    settings |= {"--preload-adapters": offered, "--served-model-name": "a"}
    flags = [str(each) for pair in settings.items() for each in pair]

    result = CliRunner().invoke(app, ["serve", *flags])

    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert said.startswith("infuse serve: the base model is to be served as 'a'")
    assert "--served-model-name" in said
