"""The folders that PEFT writes, over HTTP and by the command line: the same answers everywhere."""

import copy
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.server.cli import app
from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.factories import save_tiny_model, tiny_model
from tests.folders import CASES, Case


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server may fetch from."""
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def url(allowed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    settings = Settings(
        model=str(model),
        adapters_dir=tmp_path_factory.mktemp("server") / "store",
        source_prefixes=f"file://{allowed}/",
    )
    with run_server(settings) as (address, _):
        yield address


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def folder(case: Case, allowed: Path, request: pytest.FixtureRequest) -> Path:
    name = "".join(filter(str.isalnum, request.node.name))
    return case.make(copy.deepcopy(tiny_model("llama")), allowed / name)


def check(case: Case, answer: httpx.Response) -> None:
    if case.answer is None:
        assert answer.status_code == 200, answer.text
        return
    field, problem, fix = case.answer
    assert answer.status_code == 400
    fault = answer.json()["error"]["details"][0]
    assert fault["field"].endswith(field)
    assert problem in fault["problem"].replace("x/", "")
    assert fix in fault["fix"]


def test_infuse_check_says_it(url: str, case: Case, folder: Path) -> None:
    result = CliRunner().invoke(app, ["adapters", "check", str(folder), "--url", url])
    if case.answer is None:
        assert result.exit_code == 0, result.stderr
        return
    assert result.exit_code == 1
    for part in case.answer:
        assert part in result.stderr


def test_an_archive_of_the_folder_says_it(url: str, case: Case, folder: Path) -> None:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.rglob("*"):
            archive.write(file, Path("x") / file.relative_to(folder))
    files = {"archive": ("x.zip", packed.getvalue())}
    check(case, httpx.post(f"{url}/v1/adapters?dry_run=true", files=files))


def test_a_form_says_it(url: str, case: Case, folder: Path) -> None:
    parts = {"config": folder / CONFIG_FILE, "weights": folder / WEIGHTS_FILE}
    if not all(part.exists() for part in parts.values()):
        parts["weights"] = folder / "adapter_model.bin"
    if all(part.exists() for part in parts.values()):
        files = {name: (part.name, part.read_bytes()) for name, part in parts.items()}
        check(case, httpx.post(f"{url}/v1/adapters?dry_run=true", files=files))


def test_a_source_says_it(url: str, case: Case, folder: Path) -> None:
    """A place is not listed: a sub-folder must be named."""
    body = {"source": f"file://{folder}"}
    answer = httpx.post(f"{url}/v1/adapters?dry_run=true", json=body)
    if (folder / CONFIG_FILE).exists():
        check(case, answer)
    else:
        assert answer.status_code == 400
        assert "a folder of its name" in answer.json()["error"]["message"]
