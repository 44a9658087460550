"""Temporary folders: each is its maker's alone, and none outlives the next one for long."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infuse.adapters.storage.scratch import scratch_folder

HOLD = """
import sys, time
from pathlib import Path
from infuse.adapters.storage.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), ".making-") as folder:
    (folder / "part").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_has_left_is_gone_when_the_next_one_begins(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        held = Path(process.stdout.readline().strip())
        with scratch_folder(tmp_path, ".making-") as mine:
            assert (held / "part").exists(), "its process lives"
            assert mine != held
        process.kill()
    assert held.exists()

    with scratch_folder(tmp_path, ".making-") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, other])
    assert list(tmp_path.iterdir()) == [other]


def test_many_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    def use(number: int) -> bool:
        with scratch_folder(tmp_path, ".making-") as folder:
            (folder / "part").write_text(str(number))
            return (folder / "part").read_text() == str(number)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(use, range(200)))
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """The folder of all temporary files is everybody's."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("stays")
    (tmp_path / ".making-link").symlink_to(tmp_path / "precious")

    with scratch_folder(tmp_path, ".making-"):
        assert (tmp_path / "precious" / "file").read_text() == "stays"


def test_a_folder_that_was_moved_to_its_place_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, ".making-") as folder:
        folder.rename(tmp_path / "made")

    assert (tmp_path / "made").is_dir()
