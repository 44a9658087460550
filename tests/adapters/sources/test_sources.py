"""Fetching adapters: which files arrive, their exact origin, and what is refused."""

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import anyio
import httpx2
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from infuse.adapters.errors import (
    InvalidAdapter,
    SourceNotAllowed,
    SourceNotFound,
    SourceRefused,
    SourceTooLarge,
)
from infuse.adapters.sources.source_url import parse_prefixes, parse_source
from infuse.adapters.sources.sources import Sources, sign
from tests.publishers import (
    BUCKET,
    HUB_TOKEN,
    Files,
    Hub,
    use_bucket_endpoint,
)
from tests.publishers import bucket as bucket
from tests.publishers import hub as hub

FILES: Files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 1000}
BESIDE: Files = {"README.md": b"# x", "model.sig": b"{}"}
MORE: Files = BESIDE | {"tokenizer.json": b"tokens", "chat_template.jinja": b"{{ messages }}"}
UNWANTED: Files = {"training_args.bin": b"x", "pytorch_model.bin": b"x"}


def fetch(
    url: str,
    folder: Path,
    *,
    prefixes: str = f"hf://org,s3://{BUCKET},file:///",
    max_bytes: int = 1 << 20,
    timeout: float = 60.0,
) -> str:
    async def run() -> str:
        return await Sources(parse_prefixes(prefixes), max_bytes, timeout).fetch(url, folder)

    return anyio.run(run)


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def staged(tmp_path: Path) -> Path:
    return write(tmp_path / "staged", {})


Publish = Callable[[Files], str]


@pytest.fixture(params=["hf", "s3", "file"])
def publish(request: pytest.FixtureRequest, tmp_path: Path) -> Publish:
    """Puts files into a folder somewhere, and says its URL."""
    if request.param == "hf":
        hub: Hub = request.getfixturevalue("hub")

        def to_hub(files: Files) -> str:
            hub.commit("org/name", {f"sub/{name}": data for name, data in files.items()})
            return "hf://org/name@main/sub"

        return to_hub
    if request.param == "s3":
        put = request.getfixturevalue("bucket")

        def to_bucket(files: Files) -> str:
            for name, data in files.items():
                put(f"some/a b=c/{name}", data)
            return f"s3://{BUCKET}/some/a b=c"

        return to_bucket
    return lambda files: f"file://{write(tmp_path / 'there', files)}"


# From each kind of place.


def test_the_wanted_files_come_and_no_others(publish: Publish, staged: Path) -> None:
    fetch(publish(FILES | MORE | UNWANTED), staged)

    assert read(staged) == FILES | MORE


def test_a_place_without_an_adapter_is_said_to_have_none(publish: Publish, staged: Path) -> None:
    url = publish(BESIDE | UNWANTED)

    with pytest.raises(SourceNotFound, match="There is no adapter at"):
        fetch(url, staged)


@pytest.mark.parametrize("name", FILES)
def test_one_of_the_two_files_alone_comes_for_the_checks_to_name_the_other(
    publish: Publish, staged: Path, name: str
) -> None:
    fetch(publish({name: FILES[name]}), staged)

    assert read(staged) == {name: FILES[name]}


def test_pickled_weights_are_refused_and_do_not_come(publish: Publish, staged: Path) -> None:
    url = publish({"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})

    with pytest.raises(InvalidAdapter, match="pickled, which can run code") as refusal:
        fetch(url, staged)
    assert "save_pretrained" in refusal.value.faults[0].fix
    assert "adapter_model.bin" not in read(staged)


def test_what_is_larger_than_the_limit_is_cut_off(publish: Publish, staged: Path) -> None:
    url = publish(FILES | MORE)
    size = sum(map(len, (FILES | MORE).values()))

    with pytest.raises(SourceTooLarge, match=f"limit of {size - 1} bytes"):
        fetch(url, staged, max_bytes=size - 1)
    assert sum(map(len, read(staged).values())) < size
    for path in staged.iterdir():
        path.unlink()
    fetch(url, staged, max_bytes=size)


def test_what_is_not_allowed_is_not_asked_for(hub: Hub, staged: Path) -> None:
    hub.commit("organisation/name", FILES)

    with pytest.raises(SourceNotAllowed, match="--source-prefixes"):
        fetch("hf://organisation/name", staged)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("allowed", "limit", "inside", "outside"),
    [
        ("hf://a/", "hf://", ["hf://a/x"], ["hf://b/x"]),
        ("hf://", "hf://a/", ["hf://a/x"], ["hf://b/x"]),
        ("s3://bucket/a", "s3://bucket/a/b", ["s3://bucket/a/b/c"], ["s3://bucket/a/c"]),
        ("hf://a/,s3://bucket/", "s3://bucket/b", ["s3://bucket/b"], ["hf://a/x", "s3://bucket/c"]),
        ("hf://a/", "hf://b/", [], ["hf://a/x", "hf://b/x"]),
        ("hf://a/", "", [], ["hf://a/x"]),
    ],
)
def test_limited_sources_are_what_both_allow(
    allowed: str, limit: str, inside: list[str], outside: list[str]
) -> None:
    limited = Sources(parse_prefixes(allowed), 1, 1).limited_to(parse_prefixes(limit))

    for url in inside:
        assert str(limited.check(url)) == url
    for url in outside:
        with pytest.raises(SourceNotAllowed):
            limited.check(url)


# The hub.


def test_a_branch_is_pinned_to_its_commit(hub: Hub, staged: Path) -> None:
    first = hub.commit("org/name", FILES)
    second = hub.commit("org/name", FILES | {"adapter_config.json": b"[]"})

    assert fetch("hf://org/name", staged) == f"hf://org/name@{second}"
    assert read(staged)["adapter_config.json"] == b"[]"
    assert [path for path, _ in hub.asked if "main" in path] == [
        "/org/name/resolve/main/adapter_config.json"
    ]
    for path in staged.iterdir():
        path.unlink()
    assert fetch(f"hf://org/name@{first}", staged) == f"hf://org/name@{first}"
    assert read(staged) == FILES


@pytest.mark.parametrize("url", ["hf://org/name@gone", "hf://org/name/folder"])
def test_a_revision_or_folder_that_is_not_there_is_not_found(
    hub: Hub, staged: Path, url: str
) -> None:
    hub.commit("org/name", FILES)

    with pytest.raises(SourceNotFound, match=url):
        fetch(url, staged)


def test_a_private_repository_opens_with_the_token_of_the_environment(
    hub: Hub, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/name", FILES)
    hub.private.add("org/name")
    with pytest.raises(SourceRefused, match=r"401.*HF_TOKEN"):
        fetch("hf://org/name", staged)

    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    fetch("hf://org/name", staged)

    assert read(staged) == FILES


# Buckets.


def test_a_buckets_revision_is_known_by_its_weights_etag(
    bucket: Callable[[str, bytes], None], staged: Path
) -> None:
    for name, data in FILES.items():
        bucket(f"a/{name}", data)

    origin = fetch(f"s3://{BUCKET}/a/", staged)

    place, _, etag = origin.partition("#")
    assert place == f"s3://{BUCKET}/a"
    assert len(etag) == 32, "an MD5, as S3 makes it of an object in one piece"


@pytest.mark.usefixtures("bucket")
def test_a_bucket_that_does_not_exist_is_not_found(staged: Path) -> None:
    with pytest.raises(SourceNotFound, match="s3://nobody/a"):
        fetch("s3://nobody/a", staged, prefixes="s3://")


def signed(url: str) -> httpx2.URL:
    text = anyio.run(sign, parse_source(url), 60)["adapter_config.json"]
    assert str(httpx2.URL(text)) == text, "reading a signed URL changes none of it"
    return httpx2.URL(text)


def test_s3_urls_are_signed_for_amazon_unless_an_endpoint_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_bucket_endpoint(monkeypatch, 1)
    monkeypatch.delenv("AWS_ENDPOINT_URL")

    url = signed("s3://bucket/a b/é=+,c")

    assert (url.scheme, url.host) == ("https", "s3.us-east-1.amazonaws.com")
    assert url.path == "/bucket/a b/é=+,c/adapter_config.json"
    assert url.params["X-Amz-Expires"] == str(61)


def test_azure_urls_are_signed_for_the_account(monkeypatch: pytest.MonkeyPatch) -> None:
    key = base64.b64encode(b"a key").decode()
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", key)

    url = signed("az://container/a")

    assert (url.scheme, url.host) == ("https", "account.blob.core.windows.net")
    assert url.path == "/container/a/adapter_config.json"
    assert url.params["sp"] == "r", "reading, and nothing else"


def test_google_urls_are_signed_by_the_service_account(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    account = {"private_key": key.decode(), "private_key_id": "1", "client_email": "a@example.org"}
    file = tmp_path / "account.json"
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(file))

    url = signed("gs://bucket/a")

    assert (url.scheme, url.host) == ("https", "storage.googleapis.com")
    assert url.path == "/bucket/a/adapter_config.json"
    assert "a@example.org" in url.params["X-Goog-Credential"]


def test_credentials_that_cannot_be_used_are_said_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, staged: Path
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "no-base64-secret!")

    with pytest.raises(SourceRefused, match="AZURE_STORAGE_ACCOUNT_KEY") as refusal:
        fetch("az://container/a", staged, prefixes="az://")
    assert "no-base64" not in str(refusal.value)


# Folders of this machine.


def test_a_link_out_of_what_is_allowed_is_refused(tmp_path: Path, staged: Path) -> None:
    secret = write(tmp_path / "secret", FILES)
    allowed = write(tmp_path / "allowed", {})
    (allowed / "folder").symlink_to(secret)
    write(allowed / "file", {}).joinpath("adapter_config.json").symlink_to(
        secret / "adapter_config.json"
    )

    for name in ("folder", "file"):
        with pytest.raises(SourceNotAllowed):
            fetch(f"file://{allowed}/{name}", staged, prefixes=f"file://{allowed}")
    assert read(staged) == {}


def test_a_link_within_what_is_allowed_is_followed(tmp_path: Path, staged: Path) -> None:
    """The files of the hub's own cache are links; the allowed folder may be a link too."""
    write(tmp_path / "real" / "blobs", FILES)
    folder = write(tmp_path / "real" / "a", {})
    for name in FILES:
        (folder / name).symlink_to(Path("..") / "blobs" / name)
    (tmp_path / "allowed").symlink_to(tmp_path / "real")

    fetch(f"file://{tmp_path}/allowed/a", staged, prefixes=f"file://{tmp_path}/allowed")

    assert read(staged) == FILES


def test_a_pipe_or_a_folder_in_a_files_place_is_refused(tmp_path: Path, staged: Path) -> None:
    os.mkfifo(write(tmp_path / "pipe", {}) / "adapter_config.json")
    write(tmp_path / "folder" / "adapter_config.json", {})

    for name in ("pipe", "folder"):
        with pytest.raises(SourceRefused, match=r"adapter_config\.json"):
            fetch(f"file://{tmp_path}/{name}", staged)
