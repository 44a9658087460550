"""What README and guide tell a reader to type, typed in the order of reading."""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic_settings import CliApp
from typer.testing import CliRunner

from infuse.server.cli import app
from infuse.server.on_ray.settings import DeploySettings
from infuse.server.settings import Settings
from tests.certificates import certificates
from tests.docs.blocks import GUIDE, ROOT, Block, blocks, shown_commands
from tests.served import served_by

START = "make serve\n"
HERE = "http://127.0.0.1:8000"
INSTALLED = ".installed"
"""The file by which make knows that nothing has to be installed."""
KINDS = {"serve": Settings, "warm": Settings, "deploy": DeploySettings}
"""Command -> the settings that it takes."""
PAGES = pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)


@pytest.fixture
def clone(tmp_path: Path) -> Iterator[Path]:
    """A folder like a fresh clone after `make install`, for what the commands leave behind."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != INSTALLED:
            (tmp_path / ".venv" / path.name).symlink_to(path)
    (tmp_path / ".venv" / INSTALLED).touch()
    yield tmp_path
    # A merged model is as large as its base.
    shutil.rmtree(tmp_path)


@pytest.mark.real
def test_every_command_of_readme_and_guide_does_what_the_page_says(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the pages say that the default model lies.
    monkeypatch.delenv("INFUSE_CACHE_DIR", raising=False)
    any_port = {"INFUSE_PORT": "0"}
    with served_by(["bash", "-c", START], clone / "log", clone, any_port) as url:
        for page in GUIDE:
            run(page, clone, url)


def run(page: Path, clone: Path, url: str) -> None:
    """Run a page's blocks in order. Those in Python share their names."""
    printed, names = "", {"__name__": page.stem}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        text = block.text.replace(HERE, url)
        if block.language == "text":
            for line in block.text.splitlines():
                assert line in printed, f"{where}: {line!r} is not in {printed}"
        elif block.language == "bash" and block.text != START:
            printed = run_bash(text, clone, url, where)
        elif block.language == "python":
            printed = run_python(text, clone, names, where)


def run_bash(text: str, clone: Path, url: str, where: str) -> str:
    ran = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", text],
        cwd=clone,
        env=os.environ | {"INFUSE_URL": url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, f"{where}: {ran.stdout} {ran.stderr}"
    assert '{"error":' not in ran.stdout, f"{where}: {ran.stdout}"
    # What an answer holds as JSON within JSON is shown as itself.
    return ran.stdout.replace('\\"', '"')


def run_python(text: str, clone: Path, names: dict[str, Any], where: str) -> str:
    printed = io.StringIO()
    with contextlib.chdir(clone), contextlib.redirect_stdout(printed):
        exec(compile(text, where, "exec"), names)
    return printed.getvalue()


@PAGES
def test_a_command_that_is_shown_but_not_run_has_only_known_flags(
    page: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys.json").touch()
    made = certificates(tmp_path).server
    for name in ("tls.crt", "tls.key"):
        shutil.copy(made, tmp_path / name)
    with contextlib.chdir(tmp_path):
        for command in shown_commands(page):
            program, *arguments = [w for w in shlex.split(command) if not w.startswith("INFUSE_")]
            if Path(program).name == "infuse" and arguments[0] in KINDS:
                CliApp.run(KINDS[arguments[0]], cli_args=arguments[1:])
            elif Path(program).name == "infuse":
                assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0, command


@PAGES
def test_a_block_says_whether_it_is_run(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("bash", "python", "text", "console", "yaml", "toml"), block
        if block.language == "console":
            lines = block.text.replace("\\\n", " ").splitlines()
            assert all(line.startswith("$ ") for line in lines), block


@PAGES
def test_every_flag_and_variable_that_a_page_names_is_one(page: Path) -> None:
    text = page.read_text()
    variables = {f"INFUSE_{name.upper()}" for name in DeploySettings.model_fields}
    variables |= {"INFUSE_URL", "INFUSE_API_KEY", "INFUSE_CACHE_DIR", "INFUSE_IA3_ADAPTERS"}
    assert set(re.findall(r"\bINFUSE_[A-Z0-9_]+\b", text)) <= variables
    lines = (block.text.replace("\\\n", " ").splitlines() for block in blocks(page))
    code = [*re.findall(r"`[^`\n]+`", text), *chain.from_iterable(lines)]
    known = {"--" + name.replace("_", "-") for name in DeploySettings.model_fields} | _flags()
    known |= {f"--no-{flag[2:]}" for flag in known}
    others = ("benchmarks", "curl", "docker", "helm", "make test", "pip", "uvx", "vllm serve")
    for command in (each for each in code if not any(other in each for other in others)):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", command)) <= known, command


def _flags() -> set[str]:
    """Of all commands of `infuse`."""
    found, commands = {"--help"}, [typer.main.get_command(app)]
    while commands:
        command: Any = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {flag for each in command.params for flag in each.opts}
    return found


def test_a_page_of_the_guide_is_not_forgotten() -> None:
    assert set((ROOT / "docs" / "guide").glob("*.md")) == set(GUIDE[1:])


def test_the_first_command_of_readme_and_quickstart_starts_the_server() -> None:
    for page in (GUIDE[0], ROOT / "docs" / "guide" / "quickstart.md"):
        first = next(each for each in blocks(page) if each.language == "bash")
        assert first == Block("bash", START, first.line)
