"""What `pip install` brings: the wheel alone serves, beside others' `adapters` and `server`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from tests.factories import save_tiny_model
from tests.releases import REPOSITORY
from tests.served import served_by

SOURCES = ("infuse", "adapters", "server", "pyproject.toml", "README.md", "LICENSE")
PIP = (sys.executable, "-m", "pip", "--quiet")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files in its folder that the next one would take."""
    copy, built = (tmp_path_factory.mktemp(name) for name in ("copy", "built"))
    for name in SOURCES:
        if name == "infuse" or (REPOSITORY / name).is_file():
            subprocess.run(["cp", "-a", REPOSITORY / name, copy], check=True)
        else:
            shutil.copytree(REPOSITORY / name, copy / name)
    build = ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, copy)
    subprocess.run([*PIP, *build], check=True)
    (found,) = built.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that comes first among those that Python imports from."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([*PIP, "install", "--no-deps", "--target", folder, wheel], check=True)
    return folder


def test_the_wheel_takes_one_name(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"infuse"}


def test_the_wheel_has_every_file_of_the_two_folders(wheel: Path) -> None:
    here = {
        f"infuse/{path.relative_to(REPOSITORY)}"
        for folder in ("adapters", "server")
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here <= set(zipfile.ZipFile(wheel).namelist())


def test_the_installed_server_answers_beside_others_modules_of_its_folders_names(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "server.py").write_text("raise RuntimeError('not ours')")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "__init__.py").write_text("raise RuntimeError('not ours')")
    model = save_tiny_model(tmp_path / "tiny")
    command = [installed / "bin" / "infuse", "serve", "--model", model, "--port", "0"]
    paths = os.pathsep.join(map(str, (tmp_path, installed)))

    with served_by(
        [*map(str, command), f"--adapters-dir={tmp_path / 'store'}"],
        tmp_path / "log",
        cwd=tmp_path,
        env={"PYTHONPATH": paths},
    ) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "A"})

    assert answer.status_code == 200


@pytest.mark.full
def test_adapterhubs_adapters_is_installed_beside(installed: Path, tmp_path: Path) -> None:
    """Theirs is not imported: it needs an older transformers than ours."""
    beside = ("install", "--no-deps", "--target", installed, "adapters")
    subprocess.run([*PIP, *beside], check=True)
    code = (
        "from importlib.util import find_spec; import infuse.adapters; "
        "print(find_spec('adapters').origin, infuse.adapters.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs, ours = installed / "adapters/__init__.py", installed / "infuse/adapters/__init__.py"
    assert ran.stdout == f"{theirs} {ours}\n"
