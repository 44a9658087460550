"""Keys that are found by their hashes, and a keys file that changes while a server runs."""

import asyncio
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from infuse.server.cli import app
from infuse.server.engine import QueueFull
from infuse.server.keys.key_file import BadKeysFile
from infuse.server.keys.keyring import Keyring
from infuse.server.keys.secrets import hash_key, is_hash_of, new_key
from infuse.server.services import Services
from tests.api.conftest import model_folder as model_folder
from tests.api.conftest import start_server as start_server
from tests.api.test_streaming import eventually

Made = tuple[str, dict[str, Any]]


def make(name: str, **more: Any) -> Made:
    """A key, and its entry in a file."""
    key_id, key = new_key()
    return key, {"name": name, "id": key_id, "hash": hash_key(key), "roles": ["generate"], **more}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def write(path: Path, *entries: dict[str, Any]) -> None:
    """Write the file as an editor does that keeps its inode."""
    path.write_text(json.dumps(entries))


def found(keyring: Keyring, *keys: str) -> list[str | None]:
    async def find() -> list[str | None]:
        each = await asyncio.gather(*map(keyring.find, keys))
        return [None if key is None else key.name for key in each]

    return asyncio.run(find())


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The comparisons with a slow hash: the thread, and the key."""
    made = []

    def noting(key_hash: str, key: str) -> bool:
        made.append((threading.current_thread().name, key))
        return is_hash_of(key_hash, key)

    monkeypatch.setattr("infuse.server.keys.keyring.is_hash_of", noting)
    return made


# Hashes


def test_a_key_is_its_own_and_two_of_one_key_differ() -> None:
    _, key = new_key()
    first, second = hash_key(key), hash_key(key)

    assert first != second
    assert is_hash_of(first, key)
    assert is_hash_of(second, key)
    assert not is_hash_of(first, key[:-1])
    assert key not in first


def test_a_key_is_compared_with_its_slow_hash_once_and_on_a_thread(
    path: Path, checks: list[tuple[str, str]]
) -> None:
    key, entry = make("app")
    write(path, entry)
    keyring = Keyring(path)

    assert found(keyring, key, key, key) == ["app"] * 3
    assert found(keyring, key) == ["app"]
    assert [each for _, each in checks] == [key]
    assert checks[0][0] != threading.current_thread().name


def test_what_names_no_key_is_refused_without_a_slow_hash(
    path: Path, checks: list[tuple[str, str]]
) -> None:
    key, entry = make("app")
    write(path, entry)
    _, other = new_key()
    wrong = ["", "infuse", "infuse-", "infuse--", f"infuse-{entry['id']}", other, key[1:], "é" * 50]

    assert found(Keyring(path), *wrong) == [None] * len(wrong)
    assert not checks


def test_a_wrong_secret_of_a_known_id_is_refused(path: Path) -> None:
    key, entry = make("app")
    write(path, entry)

    assert found(Keyring(path), f"{key}x", key[:-1], f"infuse-{entry['id']}-") == [None] * 3


def test_many_wrong_keys_hold_up_neither_a_known_key_nor_another_s_first_request(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (flooded, first), (other, second) = make("flooded"), make("other")
    write(path, first, second)
    keyring = Keyring(path)
    assert found(keyring, flooded) == ["flooded"]
    gate = threading.Event()
    order: list[str] = []

    def slow(key_hash: str, key: str) -> bool:
        assert gate.wait(30)
        order.append(key)
        return is_hash_of(key_hash, key)

    monkeypatch.setattr("infuse.server.keys.keyring.is_hash_of", slow)

    async def flood() -> list[Any]:
        wrong = [asyncio.create_task(keyring.find(f"{flooded}{n}")) for n in range(50)]
        await asyncio.sleep(0)
        known = await keyring.find(flooded)
        assert known is not None, "it waits for nothing"
        right = asyncio.create_task(keyring.find(other))
        await asyncio.sleep(0)
        gate.set()
        assert await right is not None
        return await asyncio.gather(*wrong, return_exceptions=True)

    refused = asyncio.run(flood())

    assert order.index(other) <= 2
    assert {type(each) for each in refused} == {type(None), QueueFull}


def test_a_key_that_has_expired_opens_nothing(path: Path) -> None:
    now = datetime.now(UTC)
    (old, first), (new, second) = make("app"), make("app")
    first["expires"] = (now - timedelta(seconds=1)).isoformat()
    second["expires"] = (now + timedelta(days=1)).isoformat()
    write(path, first, second)

    assert found(Keyring(path), old, new) == [None, "app"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hash": "scrypt:2:8:1:00:00"}, "0.hash"),
        ({"id": "x"}, "0.id"),
        ({"hash": None}, "0: a key has an id and a hash"),
        ({"key": "0123456789abcdef"}, "0: a key has an id and a hash"),
        ({"expires": "2026-01-01T00:00:00"}, "0.expires"),
        ({"scope": {"max_adapters": "many"}}, "0.scope.max_adapters"),
        ({"roles": ["metrics"], "scope": {"adapters": {}}}, "0: the role metrics shows"),
    ],
)
def test_a_bad_entry_is_refused_with_the_place(
    path: Path, change: dict[str, Any], problem: str
) -> None:
    write(path, make("app")[1] | change)

    with pytest.raises(BadKeysFile) as caught:
        Keyring(path)

    assert problem in str(caught.value)
    assert "0123456789abcdef" not in str(caught.value)


def test_two_keys_with_one_id_are_refused(path: Path) -> None:
    _, entry = make("app")
    write(path, entry, entry)

    with pytest.raises(BadKeysFile, match="two keys have the id"):
        Keyring(path)


def test_keys_in_plain_work_and_are_warned_about(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, {"name": "old", "key": "0123456789abcdef", "roles": ["admin"]}, make("app")[1])

    assert found(Keyring(path), "0123456789abcdef") == ["old"]
    (warning,) = [each.message for each in caplog.records if "in plain" in each.message]
    assert "infuse keys rotate" in warning
    assert "(old)" in warning


# Changes of the file


def test_a_changed_file_is_followed(path: Path, checks: list[tuple[str, str]]) -> None:
    (stays, first), (goes, second), (comes, third) = make("stays"), make("goes"), make("comes")
    write(path, first, second)
    keyring = Keyring(path)
    assert found(keyring, stays, goes, comes) == ["stays", "goes", None]

    write(path, first, third)
    asyncio.run(keyring.look())

    assert found(keyring, stays, goes, comes) == ["stays", None, "comes"]
    assert [each for _, each in checks] == [stays, goes, comes], "what is known stays known"


@pytest.mark.fault(
    "configuration",
    "The keys file is broken or removed while the server runs",
    by="the file",
    promise="The keys stay as they were; the log says so once.",
)
@pytest.mark.parametrize("broken", ["{", "[{}]", None])
def test_a_file_that_cannot_be_used_leaves_the_keys_and_says_so_once(
    path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    key, entry = make("app")
    write(path, entry)
    keyring = Keyring(path)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)

    for _ in range(3):
        asyncio.run(keyring.look())

    assert found(keyring, key) == ["app"]
    assert keyring.is_broken
    errors = [each.message for each in caplog.records if each.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "The keys stay as they were" in errors[0]
    write(path, entry, make("b")[1])
    asyncio.run(keyring.look())
    assert not keyring.is_broken


def test_all_keys_can_be_revoked(path: Path) -> None:
    key, entry = make("app")
    write(path, entry)
    keyring = Keyring(path)

    write(path)
    asyncio.run(keyring.look())

    assert found(keyring, key) == [None]


def test_a_file_of_the_same_length_and_time_is_seen_to_be_another(path: Path) -> None:
    """As after `infuse keys rotate`, which replaces it."""
    (old, first), (new, second) = make("app"), make("app")
    write(path, first)
    keyring = Keyring(path)
    other, status = path.with_name("other"), path.stat()
    write(other, second)
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert other.stat().st_size == status.st_size
    other.replace(path)

    asyncio.run(keyring.look())

    assert found(keyring, old, new) == [None, "app"]


Ask = Callable[[str, str], httpx.Response]


@pytest.fixture
def ask(path: Path, start_server: Callable[..., tuple[str, Services]]) -> Iterator[Ask]:
    """Ask a running server with the file for a path, with a key."""
    infuse("create", "first", path=path)
    url, _ = start_server(keys_file=path)
    with httpx.Client(base_url=url) as client:
        yield lambda at, key: client.get(at, headers={"Authorization": f"Bearer {key}"})


def infuse(*words: str, path: Path) -> str:
    done = CliRunner().invoke(app, ["keys", *words, "--file", str(path)])
    assert done.exit_code == 0, done.stderr
    return done.stdout.strip()


def test_a_running_server_follows_what_the_command_line_does(ask: Ask, path: Path) -> None:
    def served(key: str) -> int:
        return ask("/v1/models", key).status_code

    first = infuse("create", "app", path=path)
    assert eventually(lambda: served(first) == 200)

    second = infuse("rotate", "app", "--grace-hours", "1", path=path)
    assert eventually(lambda: served(second) == 200)
    assert served(first) == 200

    infuse("revoke", "app", path=path)
    assert eventually(lambda: served(second) == 401)
    assert served(first) == 401


@pytest.mark.fault(
    "configuration",
    "The keys file is cut while the server runs",
    by="the file",
    promise="`infuse_keys_file_broken` is 1 until it is mended.",
)
def test_the_metrics_of_a_running_server_say_that_the_file_is_broken(ask: Ask, path: Path) -> None:
    key = infuse("create", "prometheus", "--role", "metrics", path=path)
    good = path.read_text()
    assert eventually(lambda: "infuse_keys_file_broken 0.0" in ask("/metrics", key).text)

    path.write_text(good[:-9])
    assert eventually(lambda: "infuse_keys_file_broken 1.0" in ask("/metrics", key).text)

    path.write_text(good)
    assert eventually(lambda: "infuse_keys_file_broken 0.0" in ask("/metrics", key).text)
