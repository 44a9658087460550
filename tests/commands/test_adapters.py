"""`infuse adapters …`, beyond what tests/test_cli.py types."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.commands.conftest import Infuse, Typed

pytestmark = pytest.mark.usefixtures("added")


def test_a_terminal_gets_a_table_with_a_header_and_sizes_for_people(typed: Typed) -> None:
    header, first, second = typed("adapters", "list").splitlines()

    assert header.split() == ["name", "revision", "size", "created"]
    assert first.split()[:2] == ["first", "2"]
    assert first.split()[3] in ("bytes", "kB")
    assert second.split()[:2] == ["second", "1"]


def test_a_pipe_gets_tabs_and_whole_numbers_without_a_header(infuse: Infuse) -> None:
    first, second = infuse("adapters", "list").stdout.splitlines()

    assert first.split("\t")[:2] == ["first", "2"]
    assert int(first.split("\t")[2]) > 0
    assert second.split("\t")[:2] == ["second", "1"]


def test_an_adapter_is_shown_with_what_was_said_of_it(
    infuse: Infuse, typed: Typed, adapters: list[Path]
) -> None:
    infuse("adapters", "add", "told", adapters[0])
    told = ("--description", "Says\tyes\x1b[2J", "--tag", "support", "--tag", "de", "--no-enabled")
    assert infuse("adapters", "update", "told", *told).stdout == "told is updated\n"
    lines = dict(
        line.split("\t", 1) for line in infuse("adapters", "show", "told").stdout.splitlines()
    )
    shown = typed("adapters", "show", "told")
    whole = json.loads(infuse("adapters", "show", "told", "--json").stdout)

    infuse("adapters", "remove", "told")
    assert lines["revision"] == "1"
    assert lines["description"] == "Says?yes?[2J"
    assert lines["tags"] == '["support", "de"]'
    assert (lines["enabled"], lines["pinned"]) == ("no", "no")
    assert "Says?yes?[2J" in shown
    assert "support, de" in shown
    assert whole["description"] == "Says\tyes\x1b[2J"


def test_a_plot_shows_what_is_amplified_and_inhibited_by_layer(
    infuse: Infuse, typed: Typed
) -> None:
    whole = json.loads(infuse("adapters", "show", "first", "--plot", "--json").stdout)
    lines = infuse("adapters", "show", "first", "--plot").stdout.splitlines()
    drawn = typed("adapters", "show", "first", "--plot").splitlines()

    means = {(each["kind"], each["layer"]): each["mean"] for each in whole["modules"]}
    assert [line.split("\t")[0] for line in lines] == [
        "mlp.down_proj (input)",
        "self_attn.k_proj (output)",
        "self_attn.v_proj (output)",
    ]
    keys = [float(value) for value in lines[1].split("\t")[1:]]
    kind = "model.layers.*.self_attn.k_proj"
    assert keys == [means[kind, 0] - 1, means[kind, 1] - 1]
    assert drawn[0].startswith("mlp.down_proj (input)")
    largest = max(means.values(), key=lambda mean: abs(mean - 1))
    assert ("+" if largest > 1 else "-") in "".join(drawn[:3])
    assert drawn[3].startswith("2 layers from left to right; ")


def test_an_update_without_a_change_names_what_there_is_to_change(infuse: Infuse) -> None:
    refused = infuse("adapters", "update", "first")

    assert refused.exit_code == 2
    assert "--description" in refused.stderr


def test_a_download_is_what_was_uploaded(
    infuse: Infuse, adapters: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "new" / "first"
    done = infuse("adapters", "download", "first", target)
    again = infuse("adapters", "download", "first", target)
    unknown = infuse("adapters", "download", "nobody", tmp_path / "nobody")

    assert (done.stdout, done.stderr) == (f"{target} holds first\n", "")
    name = "adapter_model.safetensors"
    assert load_file(target / name).keys() == load_file(adapters[0] / name).keys()
    assert (target / name).read_bytes() == (adapters[0] / name).read_bytes()
    assert (again.exit_code, again.stderr) == (1, f"{target}: File exists; name a new folder\n")
    assert unknown.exit_code == 1
    assert not (tmp_path / "nobody").exists()


def test_a_name_that_is_taken_names_the_flag_that_replaces(
    infuse: Infuse, adapters: list[Path]
) -> None:
    added = infuse("adapters", "add", "first", adapters[0])
    combined = infuse("adapters", "combine", "first", "second")

    assert added.stderr == (
        "An adapter named 'first' exists already; give --replace to add a revision, "
        "or remove it first\n"
    )
    assert combined.stderr == (
        "An adapter named 'first' exists already; take another name, or remove it first: "
        "infuse adapters remove\n"
    )


def test_a_missing_key_names_the_flag_that_gives_one(
    infuse: Infuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INFUSE_API_KEY")

    assert infuse("adapters", "list").stderr == (
        "No valid API key was given; give one with --api-key, or set INFUSE_API_KEY\n"
    )


def test_a_fault_is_said_once(infuse: Infuse) -> None:
    refused = infuse("adapters", "rollback", "first", "0")

    assert refused.exit_code == 1
    assert refused.stderr.count("revision") == 1
    assert len(refused.stderr.splitlines()) == 1


def test_check_says_in_which_sub_folder_the_adapter_is(
    infuse: Infuse, adapters: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "support").symlink_to(adapters[0])
    below = infuse("adapters", "check", tmp_path)
    (tmp_path / "deeper" / "still").mkdir(parents=True)
    (tmp_path / "support").rename(tmp_path / "deeper" / "still" / "support")
    deep = infuse("adapters", "check", tmp_path)

    assert below.exit_code == 0
    assert below.stderr == f"The adapter is in the sub-folder {tmp_path / 'support'}\n"
    assert deep.exit_code == 1
    assert "deeper/still/support" in deep.stderr


def test_check_says_how_to_convert_a_pickle(
    infuse: Infuse, adapters: list[Path], tmp_path: Path
) -> None:
    config = "adapter_config.json"
    (tmp_path / config).write_bytes((adapters[0] / config).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    refused = infuse("adapters", "check", tmp_path)

    assert refused.exit_code == 1
    assert "adapter_model.bin is pickled, which can run code" in refused.stderr
    assert "safe_serialization=True" in refused.stderr


def test_no_progress_bar_is_written_to_a_pipe(
    infuse: Infuse, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")

    assert infuse("adapters", "check", adapters[0]).stderr == ""


def test_an_upload_shows_its_progress_on_a_terminal(typed: Typed, adapters: list[Path]) -> None:
    assert "Uploading" in typed("adapters", "check", adapters[0])


def test_a_download_keeps_to_the_mask_of_its_user(infuse: Infuse, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        infuse("adapters", "download", "second", tmp_path / "second")
    finally:
        os.umask(before)

    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "second").iterdir()} == {0o640}
    assert (tmp_path / "second").stat().st_mode & 0o777 == 0o750
