"""What `infuse deploy` refuses before anything starts."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infuse.server.cli import app
from infuse.server.on_ray.settings import DeploySettings


def deploy(*arguments: object) -> tuple[int, list[str]]:
    """The exit status, and what was said."""
    result = CliRunner().invoke(app, ["deploy", "--port=0", *map(str, arguments)])
    return result.exit_code, result.stderr.splitlines()


def test_a_store_that_is_not_shared_is_refused_in_one_line(tmp_path: Path) -> None:
    assert deploy("--adapters-dir", tmp_path, "--replicas=3") == (
        2,
        [f"infuse deploy: settings: replicas share the adapters in {tmp_path}: set --shared-store"],
    )


def test_fewer_replicas_at_most_than_at_least_are_refused() -> None:
    status, said = deploy("--shared-store", "--replicas=3", "--max-replicas=2")

    assert status == 2
    assert said == ["infuse deploy: settings: --max-replicas 2 is less than --replicas 3"]


def test_a_port_for_administration_is_refused_as_ray_s_proxy_has_one() -> None:
    status, said = deploy("--shared-store", "--admin-port=8001")

    assert status == 2
    assert said == [
        "infuse deploy: settings: --admin-port is for infuse serve: Ray's proxy listens on one port"
    ]


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "infuse.server.on_ray.deploying", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    status, said = deploy("--shared-store")

    assert status == 2
    assert said[-1].endswith("pip install 'infuse-server[ray]'")


def test_a_model_that_is_not_there_is_said_before_ray_starts(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    status, said = deploy("--shared-store", f"--model={tmp_path / 'none'}")

    assert status == 2
    assert said[-1].startswith("infuse deploy: no")
    assert str(tmp_path / "none") in said[-1]


def test_replicas_find_what_lies_beside_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    settings = DeploySettings(shared_store=True, model="model", adapters_dir="store").absolute()

    assert settings.model == str(tmp_path / "model")
    assert settings.adapters_dir == tmp_path / "store"
    assert DeploySettings(shared_store=True, model="org/hub-id").absolute().model == "org/hub-id"
