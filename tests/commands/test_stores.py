"""`infuse backup` and `infuse restore`, as they are typed."""

import json
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from infuse.adapters.storage.store import AdapterStore
from infuse.server.cli import app
from tests.adapters.storage.store_contents import content_of, create


def infuse(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with closing(AdapterStore(tmp_path / "live")) as store:
        create(store, "support", "a")
        create(store, "other", "b")
    return tmp_path / "live"


def test_what_was_backed_up_is_restored(folder: Path, s3: str, tmp_path: Path) -> None:
    made = infuse("backup", s3, "--adapters-dir", folder)
    assert (made.exit_code, made.stderr) == (0, "")
    assert made.stdout == f"{s3} holds 2 adapters, as of event 2\n"
    again = tmp_path / "again"
    restored = infuse("restore", s3, "--adapters-dir", again)
    assert (restored.exit_code, restored.stderr) == (0, "")
    assert restored.stdout == f"{again} holds 2 adapters, as of event 2\n"
    with closing(AdapterStore(again)) as store:
        assert content_of(store, store.current("support")) == "a"


def test_the_store_is_the_one_that_the_server_would_use(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFUSE_ADAPTERS_DIR", str(folder))
    assert "holds 2 adapters" in infuse("backup", tmp_path / "saved").stdout


def test_a_backup_without_damaged_files_names_them_and_fails(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("content/*/weights"):
        path.write_text(path.read_text().replace("b", "x"))
    made = infuse("backup", tmp_path / "saved", "--adapters-dir", folder)
    assert made.exit_code == 1
    assert "the files of other@1 are damaged and not in the backup" in made.stderr
    restored = infuse("restore", tmp_path / "saved", "--adapters-dir", tmp_path / "again")
    assert restored.exit_code == 0
    assert "without the files of other@1" in restored.stderr


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["backup", "ftp://x"], 2, "'ftp://x' is no folder and no bucket"),
        (["restore", "nowhere"], 1, "infuse restore: There is no folder nowhere: check the path."),
        (["backup", "saved", "--adapters-dir", "no"], 1, "infuse backup: There is no folder no"),
        (["backup", "/proc/saved", "--adapters-dir", "live"], 1, "infuse backup: [Errno 2]"),
    ],
)
@pytest.mark.usefixtures("folder")
def test_what_goes_wrong_is_said_in_a_line(
    words: list[str], status: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = infuse(*words)
    assert result.exit_code == status
    # Typer draws a box around what it says itself.
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_the_config_file_says_where_the_store_is(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("infuse.toml").write_text(f"adapters-dir = '{folder}'\nport = 8123\n")
    made = infuse("backup", "saved", "--json")
    Path("infuse.toml").write_text("adapters-dir = ")
    broken = infuse("backup", "again")

    assert json.loads(made.stdout) == {"adapters": 2, "events": 2, "damaged": []}
    assert broken.exit_code == 2
    assert "infuse.toml cannot be read" in broken.stderr
