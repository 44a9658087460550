"""The command line, against a real server and as a process of its own."""

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from infuse.adapters.storage.store import AdapterStore
from infuse.server.cli import app, bind
from infuse.server.client import Client
from infuse.server.settings import Settings
from tests.api.conftest import run_server
from tests.factories import save_adapter, save_tiny_model, tiny_model
from tests.publishers import Hub
from tests.publishers import hub as hub

INFUSE = Path(sys.executable).with_name("infuse")
KEY = "an-administrators-key"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tiny_model("llama"), tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture(scope="module")
def url(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    keys = folder / "keys.json"
    keys.write_text(json.dumps([{"name": "ops", "key": KEY, "roles": ["admin"]}]))
    settings = Settings(
        model=str(model_folder),
        adapters_dir=folder / "store",
        keys_file=keys,
        source_prefixes="hf://org/",
    )
    with run_server(settings) as (address, _):
        yield address


def infuse(url: str, *arguments: object, key: str = KEY) -> Result:
    environment = {"INFUSE_URL": url, "INFUSE_API_KEY": key}
    return CliRunner().invoke(app, ["adapters", *map(str, arguments)], env=environment)


def test_an_adapter_is_checked_added_listed_replaced_and_removed(
    url: str, adapter: Path, tmp_path: Path
) -> None:
    other = save_adapter(tiny_model("llama"), tmp_path / "b", seed=2)
    checked = infuse(url, "check", adapter)
    assert checked.exit_code == 0
    assert checked.stdout == f"{adapter} fits: it rescales 6 modules\n"
    assert infuse(url, "list").stdout == ""

    assert infuse(url, "add", "support", adapter).stdout == "support is revision 1\n"
    assert infuse(url, "add", "support", adapter, "--replace").stdout == "support is unchanged\n"
    assert infuse(url, "add", "support", other, "--replace").stdout == "support is revision 2\n"
    assert infuse(url, "list").stdout.startswith("support\t2\t")
    assert infuse(url, "remove", "support").exit_code == 0
    assert infuse(url, "list").stdout == ""


def test_a_published_adapter_is_fetched_by_the_server(url: str, adapter: Path, hub: Hub) -> None:
    commit = hub.commit("org/name", {file.name: file.read_bytes() for file in adapter.iterdir()})

    checked = infuse(url, "check", "hf://org/name")
    added = infuse(url, "add", "published", "hf://org/name@main")
    again = infuse(url, "add", "published", "hf://org/name", "--replace")
    refused = infuse(url, "add", "other", "hf://stranger/name")

    assert checked.stdout == "hf://org/name fits: it rescales 6 modules\n"
    assert added.stdout == "published is revision 1\n"
    assert again.stdout == "published is unchanged\n"
    assert f"\thf://org/name@{commit}\t" in infuse(url, "revisions", "published").stdout
    assert refused.exit_code == 1
    assert "--source-prefixes" in refused.stderr
    infuse(url, "remove", "published")


def test_adapters_are_combined_and_rolled_back(url: str, adapter: Path, tmp_path: Path) -> None:
    other = save_adapter(tiny_model("llama"), tmp_path / "b", seed=2)
    infuse(url, "add", "a", adapter)
    infuse(url, "add", "a", other, "--replace")
    combined = infuse(url, "combine", "c", "a@1=0.5", "a@2", "--method", "ties", "--density", 0.5)
    assert combined.stdout == "c is revision 1\n", combined.stderr
    assert infuse(url, "rollback", "a", 1).stdout == "a is revision 3\n"
    assert infuse(url, "rollback", "a", 1).stdout == "a is unchanged\n"
    lines = infuse(url, "revisions", "a").stdout.splitlines()

    assert [line.split("\t")[0] for line in lines] == ["3", "2", "1"]
    assert lines[0].endswith("rollback to 1\tops")
    assert infuse(url, "combine", "d", "a=much").exit_code == 2
    for name in ("a", "c"):
        infuse(url, "remove", name)


def test_json_is_the_servers_answer(url: str, adapter: Path) -> None:
    added = json.loads(infuse(url, "add", "plain", adapter, "--json").stdout)
    [listed] = json.loads(infuse(url, "list", "--json").stdout)

    assert (added["name"], added["revision"], added["warnings"]) == ("plain", 1, [])
    assert listed == added
    infuse(url, "remove", "plain")


def test_a_list_of_more_than_a_page_is_whole(url: str, adapter: Path) -> None:
    for number in range(3):
        infuse(url, "add", f"a{number}", adapter)
    with Client(url, KEY) as client:
        assert [a["name"] for a in client.adapters(page_size=2)] == ["a0", "a1", "a2"]
    for number in range(3):
        infuse(url, "remove", f"a{number}")


def test_every_fault_is_printed(url: str, adapter: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"inference_mode": "x"}))
    (broken / "adapter_model.safetensors").write_bytes(b"short")
    result = infuse(url, "check", broken)

    assert result.exit_code == 1
    assert "2 faults" in result.stderr
    assert "inference_mode" in result.stderr
    assert "adapter_model.safetensors" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("add", "x", "/no/such/folder"), "save_pretrained"),
        (("remove", "nobody"), "no adapter named 'nobody'"),
        (("add",), "Missing argument"),
    ],
)
def test_what_cannot_be_done_is_said_on_stderr(
    url: str, arguments: tuple[str, ...], said: str
) -> None:
    result = infuse(url, *arguments)

    assert result.exit_code != 0
    assert result.stdout == ""
    assert said in result.stderr


def test_a_wrong_key_is_said(url: str) -> None:
    result = infuse(url, "list", key="not-the-right-key")

    assert result.exit_code == 1
    assert "No valid API key" in result.stderr


def test_a_server_that_is_not_there_is_said() -> None:
    result = infuse("http://127.0.0.1:9", "list")

    assert result.exit_code == 1
    assert "is the server up?" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        "add",
        "check",
        "combine",
        "download",
        "list",
        "remove",
        "revisions",
        "rollback",
        "show",
        "sign",
        "update",
        "verify",
    ],
)
def test_every_command_shows_an_example(command: str) -> None:
    result = CliRunner().invoke(app, ["adapters", command, "--help"])

    assert f"Example: infuse adapters {command}" in result.stdout


# `infuse serve`, as a process.


def serve(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INFUSE, "serve", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
    )


def test_help_lists_every_setting() -> None:
    result = serve("--help")

    assert result.returncode == 0
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in result.stdout
    assert "INFUSE_MAX_MODEL_LEN" in result.stdout


def test_a_model_folder_that_does_not_exist_is_one_clear_line(tmp_path: Path) -> None:
    result = serve("--model", "/does/not/exist", "--adapters-dir", tmp_path / "store")

    assert result.returncode == 2
    assert result.stderr.startswith("infuse serve: no model at '/does/not/exist'")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--port", "70000"], {}, "--port: Input should be less than or equal to 65535"),
        (["--prot", "1"], {}, "--prot"),
        (["--host", "0.0.0.0"], {}, "listens on loopback only, not on 0.0.0.0"),
        (["--host", "::"], {}, "listens on loopback only, not on ::"),
        (["--host", "example.org"], {}, "no IP address"),
        (["--keys-file", "/no/keys"], {}, "no keys file at /no/keys"),
        (["--source-prefixes", "org/"], {}, "--source-prefixes: The URL begins with none of hf://"),
        ([], {"INFUSE_MAX_QUEUE": "0"}, "INFUSE_MAX_QUEUE: Input should be greater"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    arguments: list[str], environment: dict[str, str], said: str
) -> None:
    result = serve(*arguments, **environment)

    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.fault(
    "configuration",
    "The port is in use",
    by="a socket that listens on it",
    promise="One line says so; status 2.",
)
def test_a_port_in_use_is_said_and_nothing_is_served(model_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = serve("--model", model_folder, "--adapters-dir", tmp_path, "--port", port)

    assert result.returncode == 2
    assert result.stderr == (
        f"infuse serve: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    )


def test_a_connection_sends_each_token_at_once() -> None:
    with closing(bind("127.0.0.1", 0)) as listening:
        # This is what asyncio goes by when it decides about TCP_NODELAY.
        assert listening.proto == socket.IPPROTO_TCP


@pytest.mark.fault(
    "configuration",
    "There is a file where a folder should be",
    by="the file",
    promise="One line says where; status 2.",
)
@pytest.mark.parametrize("setting", ["--adapters-dir", "--preload-adapters"])
def test_a_file_in_a_folders_place_is_one_line(
    model_folder: Path, tmp_path: Path, setting: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    settings = {"--model": model_folder, "--adapters-dir": tmp_path / "store", "--port": 0}
    flags = [str(each) for pair in (settings | {setting: file}).items() for each in pair]

    result = CliRunner().invoke(app, ["serve", *flags])

    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert said.startswith("infuse serve: ")
    assert str(file) in said


@pytest.mark.fault(
    "configuration",
    "The keys file is wrong at the start",
    by="the file",
    promise="One line says where, without a key; status 2.",
)
def test_keys_that_cannot_be_used_are_one_line_without_a_key(
    model_folder: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{"name": "x", "key": "a-secret-key-of-mine", "roles": ["root"]}]))
    result = serve("--model", model_folder, "--adapters-dir", tmp_path, "--keys-file", keys)

    assert result.returncode == 2
    assert "is wrong at 0.roles" in result.stderr
    assert "a-secret-key-of-mine" not in result.stderr


@pytest.mark.fault(
    "configuration",
    "Another server owns the adapters' folder",
    by="a second process",
    promise="One line says so; status 2.",
)
def test_an_adapters_folder_that_another_server_owns_is_one_line(
    model_folder: Path, tmp_path: Path
) -> None:
    with closing(AdapterStore(tmp_path)):
        result = serve("--model", model_folder, "--adapters-dir", tmp_path)

    assert result.returncode == 2
    assert "infuse serve: another server uses the adapters folder" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s3://not-there/x", "infuse serve: The bucket s3://not-there/x cannot be used: "),
        ("ftp://bucket", "infuse serve: --adapters-dir: 'ftp://bucket' is no folder and no bucket"),
    ],
)
def test_a_bucket_that_cannot_be_used_is_one_line(
    model_folder: Path, tmp_path: Path, place: str, said: str
) -> None:
    arguments = ["serve", "--port", 0, "--model", model_folder]
    arguments += ["--adapters-dir", place, "--adapters-cache-dir", tmp_path]
    result = CliRunner().invoke(app, [str(each) for each in arguments])

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(said)


@pytest.mark.fault(
    "configuration",
    "A folder to preload has no adapter",
    by="the folder",
    promise="It is passed over with the reason; the others are served.",
)
def test_preloaded_folders_that_do_not_fit_are_passed_over_with_the_reason(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    (folder / "empty").mkdir(parents=True)
    (folder / "good").symlink_to(adapter)
    settings = Settings(
        model=str(model_folder), adapters_dir=tmp_path / "store", preload_adapters=folder
    )
    for _ in range(2):
        with run_server(settings) as (_, services):
            assert services.registry.stored.names() == ["good"]
            assert services.registry.stored.current("good").number == 1


def test_preloading_leaves_what_an_operator_has_changed(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    other = save_adapter(tiny_model("llama"), tmp_path / "other", seed=2)
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "a").symlink_to(adapter)
    settings = Settings(
        model=str(model_folder),
        adapters_dir=tmp_path / "store",
        preload_adapters=tmp_path / "adapters",
    )
    with run_server(settings) as (address, _):
        infuse(address, "add", "a", other, "--replace")
    with run_server(settings) as (_, services):
        assert services.registry.stored.current("a").number == 2


def test_a_merged_model_answers_without_its_adapter(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "merged"
    arguments = ["merge", output, adapter, "--model", model_folder]
    merged = CliRunner().invoke(app, [str(part) for part in arguments])
    again = CliRunner().invoke(app, [str(part) for part in arguments])

    assert merged.exit_code == 0, merged.stderr
    assert (output / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(output)
    assert (again.exit_code, again.stdout) == (1, "")
    assert again.stderr == f"infuse merge: {output} exists already\n"


def test_several_are_merged_as_the_composition_says(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    weights = {}
    for composition in ("product", "linear"):
        output = tmp_path / composition
        parts = [output, f"{adapter}=0.5", f"{adapter}=0.5", "--composition", composition]
        arguments = ["merge", *parts, "--model", model_folder]
        merged = CliRunner().invoke(app, [str(part) for part in arguments])
        assert merged.exit_code == 0, merged.stderr
        assert f"{composition} of" in (output / "README.md").read_text()
        weights[composition] = load_file(output / "model.safetensors")
    whole = CliRunner().invoke(
        app, ["merge", str(tmp_path / "a"), str(adapter), "--model", str(model_folder)]
    )
    assert whole.exit_code == 0, whole.stderr

    for key, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        torch.testing.assert_close(weights["linear"][key], tensor)
    key = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(weights["product"][key], weights["linear"][key])


def test_a_disk_that_fills_while_a_merge_writes_is_one_line(
    model_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    arguments = ["merge", str(tmp_path / "out"), str(adapter), "--model", str(model_folder)]
    try:
        refused = CliRunner().invoke(app, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    assert refused.exit_code == 1
    assert refused.stderr == f"infuse merge: The disk of {tmp_path} is full; make room.\n"
    assert list(tmp_path.iterdir()) == []
