"""Settings as `infuse serve` reads them: the config file, the environment, and the help."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from infuse.server.cli import app
from infuse.server.commands.settings import grouped, read_settings
from infuse.server.on_ray.settings import DeploySettings
from infuse.server.settings import Settings


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder."""
    monkeypatch.chdir(tmp_path)
    for name in DeploySettings.model_fields:
        monkeypatch.delenv(f"INFUSE_{name.upper()}", raising=False)
    # Logs are set up once in a process, and pytest reads them as they are.
    monkeypatch.setattr("infuse.server.observability.logs.set_up", lambda *_: None)
    return tmp_path


def read(*flags: str) -> Settings:
    return read_settings("serve", list(flags), Settings)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "infuse.toml").write_text(
        "max-queue = 1\nmax-batch-rows = 1\nport = 1\nprefix-cache = false\nkeep-days = 0.5\n"
    )
    monkeypatch.setenv("INFUSE_MAX_QUEUE", "2")
    monkeypatch.setenv("INFUSE_MAX_BATCH_ROWS", "2")
    settings = read("--max-queue", "3")

    assert (settings.max_queue, settings.max_batch_rows, settings.port) == (3, 2, 1)
    assert (settings.prefix_cache, settings.keep_days) == (False, 0.5)
    assert settings.host == "127.0.0.1"


@pytest.mark.parametrize("by", ["flag", "variable"])
def test_another_file_takes_the_place_of_the_one_in_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (folder / "infuse.toml").write_text("port = 1\nmax-queue = 1")
    (folder / "other.toml").write_text("port = 2")
    if by == "flag":
        settings = read("--config", "other.toml")
    else:
        monkeypatch.setenv("INFUSE_CONFIG", "other.toml")
        settings = read()

    assert (settings.port, settings.max_queue) == (2, 256)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-batch-row = 1", "'max-batch-row' is no setting; did you mean 'max-batch-rows'?"),
        ("max_queue = 1", "'max_queue' is no setting; did you mean 'max-queue'?"),
        ("config = 'x'", "'config' is no setting"),
        ("[server]\nport = 1", "'server' is no setting"),
        ("port 8000", "infuse.toml cannot be read: "),
        ("port = 70000", "infuse.toml: port: Input should be less than or equal to 65535"),
        ("host = 'nowhere'", "infuse.toml: host: 'nowhere' is no IP address and not localhost"),
        ("adapters-dir = 5", "infuse.toml: adapters-dir: Input is not a valid path"),
    ],
)
def test_what_is_wrong_with_the_file_is_one_line(
    folder: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "infuse.toml").write_text(text)
    with pytest.raises(typer.Exit) as refused:
        read()

    assert refused.value.exit_code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("infuse serve: ")
    assert said in line


def test_a_file_that_is_named_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        read("--config", "nowhere.toml")

    assert "infuse serve: nowhere.toml cannot be read: " in capsys.readouterr().err


def test_a_variable_that_sets_nothing_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("INFUSE_MAX_MODEL_LENGHT", "INFUSE_URL", "INFUSE_REPLICAS", "INFUSE_QQQQ"):
        monkeypatch.setenv(name, "3")
    read()

    said = [record.message for record in caplog.records if "INFUSE_" in record.message]
    assert said == [
        "The environment variable INFUSE_MAX_MODEL_LENGHT sets nothing; did you mean "
        "'INFUSE_MAX_MODEL_LEN'?",
        "The environment variable INFUSE_QQQQ sets nothing",
    ]


def test_the_help_has_groups_and_defaults_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    text = CliRunner().invoke(app, ["serve", "--help"]).stdout

    titles = [title for title in grouped(Settings) if title]
    assert [line[:-1] for line in text.splitlines() if line.endswith(":")] == ["options", *titles]
    assert "Largest upload, also unpacked. (default: 512 MiB)" in text
    assert "one that has waited so long 503. (default: 300 s)" in text
    assert "(default: on)" in text
    assert "null" not in text


def test_every_setting_is_in_one_group() -> None:
    for kind in (Settings, DeploySettings):
        names = [name for group in grouped(kind).values() for name in group]
        assert names == list(kind.model_fields)


def test_the_version_is_printed() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("infuse ")
