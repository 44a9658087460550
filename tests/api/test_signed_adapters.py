"""A server that takes signed adapters only: whatever way they come, and what it makes itself."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

pytest.importorskip("model_signing", reason="pip install 'infuse-server[signing]'")

from infuse.server.cli import app
from tests.api.archives import CONFIG, WEIGHTS, zip_of
from tests.api.conftest import RunningServer, ServeAdapters
from tests.api.oracle import upload
from tests.api.test_adapters import ADAPTERS, add_archive, complete
from tests.signers import new_certificate, new_key

SIGNED = (CONFIG, WEIGHTS, "README.md", "model.sig")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Private keys, and in `trusted` the public one of `release` and the authority `acme`."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "trusted").mkdir()
    new_key(folder, "release")[1].rename(folder / "trusted" / "release.pub")
    new_key(folder, "stranger")
    *_, authority = new_certificate(folder, "acme")
    authority.rename(folder / "trusted" / "acme.crt")
    return folder


@pytest.fixture(scope="module")
def server(
    serve_adapters: ServeAdapters,
    adapter_folders: dict[str, Path],
    keys: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    """It preloads a signed adapter, `signed`, and one that is not, `unsigned`."""
    preloaded = tmp_path_factory.mktemp("preloaded")
    for name in ("signed", "unsigned"):
        shutil.copytree(adapter_folders["mlp"], preloaded / name)
    infuse("sign", preloaded / "signed", "--key", keys / "release.key")
    with serve_adapters(
        preload_adapters=preloaded,
        trusted_signers=keys / "trusted",
        source_prefixes="file:///",
        adapters_dir=tmp_path_factory.mktemp("store"),
    ) as server:
        yield server


@pytest.fixture
def folder(adapter_folders: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter that nobody has signed yet."""
    return Path(shutil.copytree(adapter_folders["queries"], tmp_path / "adapter"))


def infuse(*words: object, url: str = "") -> Result:
    result = CliRunner().invoke(app, ["adapters", *map(str, words)], env={"INFUSE_URL": url})
    assert "Traceback" not in result.output
    return result


def packed(folder: Path) -> bytes:
    return zip_of({name: (folder / name).read_bytes() for name in SIGNED})


def error_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 403, answer.text
    return dict(answer.json()["error"])


def test_what_nobody_has_signed_is_refused_whatever_way_it_comes(
    client: httpx.Client, folder: Path
) -> None:
    source = {"source": f"file://{folder}"}
    answers = [
        upload(client, "new", folder),
        upload(client, "signed", folder, "PUT"),
        client.post(ADAPTERS, json=source | {"name": "new"}),
        client.put(f"{ADAPTERS}/signed", json=source),
        client.post(f"{ADAPTERS}?dry_run=true", json=source),
        client.put(f"{ADAPTERS}/signed?dry_run=true", json=source),
    ]

    for answer in answers:
        error = error_of(answer)
        assert error["code"] == "not_signed"
        assert "no model.sig" in error["message"]
        assert "infuse adapters sign" in error["message"]
    assert client.get(f"{ADAPTERS}/new").status_code == 404
    assert client.get(f"{ADAPTERS}/signed").json()["revision"] == 1


def test_what_a_stranger_has_signed_or_was_changed_since_is_refused(
    client: httpx.Client, folder: Path, keys: Path
) -> None:
    infuse("sign", folder, "--key", keys / "stranger.key")
    stranger = add_archive(client, "new", packed(folder))
    infuse("sign", folder, "--key", keys / "release.key")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"note": "changed"}))
    changed = add_archive(client, "new", packed(folder))

    assert "no signature by a trusted signer (acme, release)" in error_of(stranger)["message"]
    assert "'release' has signed other files" in error_of(changed)["message"]
    assert CONFIG in error_of(changed)["message"]


def test_a_signed_adapter_is_served_and_shown_with_its_signer(
    client: httpx.Client, folder: Path, keys: Path, server: RunningServer
) -> None:
    assert infuse("sign", folder, "--key", keys / "release.key").exit_code == 0
    added = infuse("add", "shown", folder, "--json", url=server.base_url)
    replaced = client.put(f"{ADAPTERS}/shown", json={"source": f"file://{folder}"})

    assert json.loads(added.stdout)["signer"] == "release"
    assert replaced.json()["unchanged"], "fetched with all that was uploaded"
    assert client.get(f"{ADAPTERS}/shown").json()["signer"] == "release"
    assert complete(client, "shown").headers["Infuse-Adapter"] == "shown@1"


def test_a_certificate_of_a_trusted_authority_signs_too(
    client: httpx.Client, folder: Path, keys: Path
) -> None:
    chain = [word for n in range(2) for word in ("--certificate", keys / f"acme-{n}.crt")]
    signed = infuse("sign", folder, "--key", keys / "acme-own.key", *chain)
    assert signed.exit_code == 0, signed.output

    added = add_archive(client, "by-certificate", packed(folder))

    assert added.json()["signer"] == "acme"


def test_what_is_downloaded_is_still_signed(
    client: httpx.Client, folder: Path, keys: Path, tmp_path: Path
) -> None:
    infuse("sign", folder, "--key", keys / "release.key")
    add_archive(client, "exported", packed(folder))
    export = tmp_path / "export"
    export.mkdir()
    for file in SIGNED:
        (export / file).write_bytes(client.get(f"{ADAPTERS}/exported/files/{file}").content)

    verified = infuse("verify", export, "--trusted-signers", keys / "trusted")
    assert verified.stdout == f"{export} is signed by release\n"
    assert add_archive(client, "imported", packed(export)).json()["signer"] == "release"


def test_what_the_server_makes_itself_needs_no_signature(
    client: httpx.Client, folder: Path, keys: Path
) -> None:
    infuse("sign", folder, "--key", keys / "release.key")
    add_archive(client, "made", packed(folder))
    infuse("sign", folder, "--key", keys / "release.key")
    client.put(f"{ADAPTERS}/made", files={"archive": packed(folder)})
    parts = [{"name": "made", "weight": 0.5}, {"name": "signed", "weight": 0.5}]
    combined = client.post(
        f"{ADAPTERS}/combine", json={"name": "both", "adapters": parts, "method": "linear"}
    )
    back = client.post(f"{ADAPTERS}/made/rollback", json={"revision": 1})

    assert combined.status_code == 201
    assert combined.json()["signer"] is None
    assert (back.json()["revision"], back.json()["signer"]) == (3, "release")
    assert [each["signer"] for each in client.get(f"{ADAPTERS}/made/revisions").json()["data"]] == [
        "release"
    ] * 3


def test_of_what_is_preloaded_only_the_signed_is_offered(client: httpx.Client) -> None:
    assert client.get(f"{ADAPTERS}/signed").json()["signer"] == "release"
    assert client.get(f"{ADAPTERS}/unsigned").status_code == 404


def test_the_audit_trail_names_the_signer(server: RunningServer) -> None:
    store = server.services.settings.adapters_dir
    result = CliRunner().invoke(app, ["audit", "list", "--adapters-dir", str(store)])

    assert "\tsigned\trevision 1 by preload, signed by release\n" in result.stdout


def test_signers_that_cannot_be_read_are_the_servers_fault(
    client: httpx.Client, folder: Path, keys: Path
) -> None:
    infuse("sign", folder, "--key", keys / "release.key")
    broken = keys / "trusted" / "broken.pub"
    broken.write_text("nothing")
    answer = add_archive(client, "new", packed(folder))
    broken.unlink()

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "signers_unreadable"


def test_a_server_whose_signers_are_not_there_does_not_start(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["serve", "--port=0", f"--trusted-signers={tmp_path / 'nowhere'}"]
    )

    assert result.exit_code == 2
    assert "nowhere: No such file or directory" in result.output
