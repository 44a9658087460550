"""The systemd unit: systemd accepts it, and the server takes what it sets."""

import getpass
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from infuse.server.listener import ANSWERING_SECONDS, WRITING_SECONDS
from infuse.server.settings import Settings

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "infuse.service"


def values() -> dict[str, list[str]]:
    """Name -> its values, in the order of the unit."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        name, is_value, value = line.partition("=")
        if is_value and not line.startswith("#"):
            found[name].append(value)
    return found


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    # The program must be there, and so must the user.
    text = UNIT.read_text().replace("/opt/infuse/bin/infuse", str(shutil.which("true")))
    copy.write_text(text.replace("User=infuse", f"User={getpass.getuser()}"))

    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False
    )

    complaints = [line for line in ran.stderr.splitlines() if UNIT.name in line]
    assert (ran.returncode, complaints) == (0, []), ran.stderr


def test_the_server_takes_the_settings_that_the_unit_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text("[]")
    for variable in values()["Environment"]:
        name, _, value = variable.partition("=")
        monkeypatch.setenv(name, value.replace("/etc/infuse/keys.json", str(keys)))

    settings = Settings()

    assert settings.adapters_dir == Path("/var/lib/infuse/adapters")
    assert settings.keys_file == keys


def test_the_folders_that_the_unit_names_are_those_that_it_makes() -> None:
    [state], [cache] = values()["StateDirectory"], values()["CacheDirectory"]
    folders = {f"/var/lib/{state}", f"/var/cache/{cache}"}
    named = [each.partition("=")[2] for each in values()["Environment"]]
    kept = [each for each in [*named, *values()["WorkingDirectory"]] if each.startswith("/var")]

    assert len(kept) == 4
    for each in kept:
        assert any(Path(each).is_relative_to(folder) for folder in folders)


def test_a_server_that_stops_has_the_time_of_its_drain() -> None:
    [seconds] = values()["TimeoutStopSec"]

    assert int(seconds) > Settings().drain_timeout + ANSWERING_SECONDS + WRITING_SECONDS


def test_the_unit_starts_a_server_again_that_ended_with_status_1() -> None:
    assert values()["Restart"] == ["on-failure"]
    assert values()["StartLimitIntervalSec"] == ["0"]
