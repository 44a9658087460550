"""`infuse keys …` on a file."""

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infuse.server.cli import app
from infuse.server.keys.key_file import BadKeysFile, edited, read_keys

REPOSITORY = Path(__file__).parents[2]
Keys = Callable[..., Result]
PLAIN = {"name": "old", "key": "0123456789abcdef", "roles": ["admin"]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
def keys(path: Path) -> Keys:
    """Run `infuse keys` on the file."""

    def keys(*arguments: object) -> Result:
        words = ["keys", *map(str, arguments), "--file", str(path)]
        return CliRunner().invoke(app, words)

    return keys


def entries(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text()))


def test_a_key_is_printed_once_and_kept_as_a_hash(keys: Keys, path: Path) -> None:
    made = keys("create", "app")
    key = made.stdout.strip()

    assert made.exit_code == 0
    assert key.startswith("infuse-")
    assert "printed once" in made.stderr
    assert key.rpartition("-")[2] not in path.read_text()
    assert [(each.name, each.roles) for each in read_keys(path)] == [("app", {"generate"})]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_key_gets_roles_patterns_and_limits(keys: Keys, path: Path) -> None:
    keys(
        *("create", "acme", "--role", "generate", "--role", "admin"),
        *("--adapters", "acme/*", "--see", "shared-*", "--source", "hf://acme/"),
        *("--max-adapters", 3, "--tokens-per-minute", 1000, "--max-queue-share", 0.25),
        *("--weight", 2.5, "--burst-tokens", 500, "--guaranteed-tokens-per-minute", 800),
    )

    assert entries(path)[0]["roles"] == ["generate", "admin"]
    assert entries(path)[0]["scope"] == {
        "adapters": {"use": ["acme/*"], "see": ["shared-*"], "change": ["acme/*"]},
        "sources": ["hf://acme/"],
        "max_adapters": 3,
        "weight": 2.5,
        "tokens_per_minute": 1000,
        "burst_tokens": 500,
        "guaranteed_tokens_per_minute": 800,
        "max_queue_share": 0.25,
    }


def test_claims_let_tokens_in_and_make_no_key(keys: Keys, path: Path) -> None:
    made = keys(
        *("create", "acme", "--claim", "groups=acme", "--claim", "groups=acme-*"),
        *("--claim", "sub=a=b", "--adapters", "acme/*"),
    )
    listed = keys("list")

    assert (made.exit_code, made.stdout) == (0, "")
    assert "groups=acme,groups=acme-*,sub=a=b" in made.stderr
    (entry,) = entries(path)
    assert entry["claims"] == {"groups": ["acme", "acme-*"], "sub": ["a=b"]}
    assert "groups=acme,groups=acme-*,sub=a=b" in listed.stdout
    assert keys("rotate", "acme").exit_code == 1
    assert keys("revoke", "acme").exit_code == 0
    assert entries(path) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--claim", "groups"), "claims.groups.0: "),
        (("--claim", "=x"), "claims."),
        (("--role", "root"), "roles.0: "),
        (("--adapters", "a b"), "scope.adapters.use.0: "),
        (("--max-adapters", 0), "scope.max_adapters: "),
        (("--weight", 0), "scope.weight: "),
        (("--source", "org/"), "scope.sources: The URL begins with none of hf://"),
        (("--role", "metrics", "--adapters", "a"), "the role metrics shows the requests of all"),
    ],
)
def test_a_bad_option_is_refused_and_nothing_is_written(
    keys: Keys, path: Path, options: tuple[object, ...], problem: str
) -> None:
    refused = keys("create", "app", *options)

    assert refused.exit_code == 2
    assert problem in refused.stderr
    assert not path.exists()


def test_a_list_shows_all_but_what_opens_the_server(keys: Keys, path: Path) -> None:
    path.write_text(json.dumps([PLAIN]))
    keys("create", "app", "--max-adapters", 2)

    lines = keys("list").stdout.splitlines()
    listed = json.loads(keys("list", "--json").stdout)

    assert lines[0] == "old\tin plain\tadmin\t-\t-"
    assert lines[1].split("\t")[2:] == ["generate", "-", '{"max_adapters": 2}']
    assert [sorted(each) for each in listed] == [
        ["name", "roles"],
        ["id", "name", "roles", "scope"],
    ]


def test_a_revoked_key_is_gone(keys: Keys, path: Path) -> None:
    keys("create", "a")
    keys("create", "b")

    assert keys("revoke", "a").exit_code == 0
    assert [each["name"] for each in entries(path)] == ["b"]


def test_a_rotated_key_is_another_with_the_same_scope(keys: Keys, path: Path) -> None:
    first = keys("create", "a", "--max-adapters", 2).stdout
    (before,) = entries(path)

    second = keys("rotate", "a").stdout
    (after,) = entries(path)

    assert first != second
    assert before["id"] != after["id"]
    assert before["scope"] == after["scope"]


def test_a_rotated_key_may_go_on_for_a_while(keys: Keys, path: Path) -> None:
    path.write_text(json.dumps([PLAIN]))

    keys("rotate", "old", "--grace-hours", 2)
    keys("rotate", "old", "--grace-hours", 48)
    first, second, third = read_keys(path)

    assert first.expires is not None
    assert second.expires is not None
    assert first.expires < second.expires, "no later than it was told first"
    assert (first.key is None, third.key, third.expires) == (False, None, None)
    keys("rotate", "old")
    assert len(read_keys(path)) == 1


@pytest.mark.parametrize("command", ["revoke", "rotate"])
def test_a_key_that_there_is_not_is_said_to_be_none(keys: Keys, command: str) -> None:
    keys("create", "a")
    refused = keys(command, "b")

    assert refused.exit_code == 1
    assert "has no key 'b'" in refused.stderr


def test_a_name_that_is_taken_is_refused(keys: Keys, path: Path) -> None:
    keys("create", "a")
    refused = keys("create", "a")

    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "take another name, or rotate or revoke it" in refused.stderr
    assert len(entries(path)) == 1


def test_a_file_that_cannot_be_read_stays_as_it_is(keys: Keys, path: Path) -> None:
    path.write_text("{")
    refused = keys("create", "a")

    assert refused.exit_code == 1
    assert "is wrong at the file" in refused.stderr
    assert path.read_text() == "{"


def test_nobody_else_may_read_what_was_open_to_all(keys: Keys, path: Path) -> None:
    path.write_text(json.dumps([PLAIN]))
    path.chmod(0o644)
    keys("create", "a")

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_to_the_file_stays_a_link(keys: Keys, path: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.json"
    real.write_text(json.dumps([PLAIN]))
    path.symlink_to(real)
    keys("create", "a")

    assert path.is_symlink()
    assert len(entries(real)) == 2


def test_edits_at_once_lose_nothing(path: Path) -> None:
    def add(number: int) -> None:
        with edited(path) as found:
            found.append(PLAIN | {"name": f"key-{number}"})

    threads = [threading.Thread(target=add, args=(number,)) for number in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()

    assert {each["name"] for each in entries(path)} == {f"key-{n}" for n in range(16)}


def test_an_edit_that_fails_leaves_the_file_and_nothing_beside_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text(json.dumps([PLAIN]))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadKeysFile, match="No space left on device"), edited(path) as found:
        found.clear()

    assert entries(path) == [PLAIN]
    assert {each.name for each in path.parent.iterdir()} == {"keys.json", ".keys.json.lock"}


def test_an_edit_that_is_killed_leaves_the_file_and_the_next_one_removes_the_rest(
    keys: Keys, path: Path
) -> None:
    path.write_text(json.dumps([PLAIN]))
    code = "import os; from pathlib import Path; from infuse.server.keys.key_file import edited\n"
    code += "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
    code += f"with edited(Path({str(path)!r})) as found: found.clear()"
    killed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False)

    assert killed.returncode == -9
    assert entries(path) == [PLAIN]
    keys("create", "app")
    assert {each.name for each in path.parent.iterdir()} == {"keys.json", ".keys.json.lock"}
