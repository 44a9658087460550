"""Fetching from servers that are broken, slow, or redirect to private addresses."""

import os
import ssl
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import obstore
import pytest
import trustme
from fastapi import FastAPI, Request, Response

from infuse.adapters.errors import SourceFailed, SourceRefused, SourceTimeout, SourceTooLarge
from infuse.adapters.sources import source_http
from infuse.adapters.sources.source_http import is_public
from tests.adapters.sources.test_sources import FILES, fetch, read
from tests.adapters.sources.test_sources import staged as staged
from tests.publishers import (
    BUCKET,
    HUB_TOKEN,
    Hub,
    Talk,
    drips,
    hangs,
    never_ends,
    rude_server,
    says,
    serve,
    use_bucket_endpoint,
)
from tests.publishers import hub as hub

BROKEN: dict[str, tuple[Talk, str]] = {
    "says nothing": (says(b""), "RemoteProtocolError"),
    "speaks no HTTP": (says(b"SSH-2.0-x\r\n"), "RemoteProtocolError"),
    "sends less than it says": (
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}"),
        "RemoteProtocolError",
    ),
    "says two lengths": (
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
        "RemoteProtocolError",
    ),
    "fails": (says(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n"), "answers 500"),
    "redirects nowhere": (says(b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n"), "answers 301"),
}


def fetch_from(
    scheme: str, talk: Talk, staged: Path, monkeypatch: pytest.MonkeyPatch, **limits: float
) -> str:
    with rude_server(talk) as port:
        endpoint = use_bucket_endpoint(monkeypatch, port)
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        urls = {"hf": "hf://org/name", "s3": f"s3://{BUCKET}/a"}
        return partial(fetch, urls[scheme], staged)(**limits)  # type: ignore[arg-type]


both = pytest.mark.parametrize("scheme", ["hf", "s3"])


@both
@pytest.mark.parametrize(("talk", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_server_is_a_failure_that_is_named(
    scheme: str, talk: Talk, said: str, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceFailed, match=said) as failure:
        fetch_from(scheme, talk, staged, monkeypatch)
    assert "Signature" not in str(failure.value)


@both
def test_a_server_that_refuses_is_said_with_what_may_open_it(
    scheme: str, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbids = says(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    with pytest.raises(SourceRefused, match=r"403.*(HF_TOKEN|AWS_ACCESS_KEY_ID)") as refusal:
        fetch_from(scheme, forbids, staged, monkeypatch)
    assert "a-secret-access-key" not in str(refusal.value)


@both
@pytest.mark.parametrize("talk", [hangs, drips], ids=["hangs", "drips"])
def test_a_server_that_takes_for_ever_is_left(
    scheme: str, talk: Talk, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceTimeout, match=r"within 0\.5 seconds.*--source-timeout"):
        fetch_from(scheme, talk, staged, monkeypatch, timeout=0.5)


@both
def test_a_server_that_sends_for_ever_is_cut_off(
    scheme: str, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceTooLarge):
        fetch_from(scheme, never_ends, staged, monkeypatch, max_bytes=100_000)
    assert len(read(staged)["adapter_config.json"]) <= 100_000


def test_a_server_that_is_not_there_is_a_failure(
    staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")

    with pytest.raises(SourceFailed, match="ConnectError"):
        fetch("hf://org/name", staged)


def test_obstore_alone_would_follow_a_redirect_to_anywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """obstore's own client follows redirects, so it only signs URLs."""
    secret = says(
        b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nLast-Modified: Mon, 02 Nov 2026 10:00:00 GMT\r\n"
        b'ETag: "x"\r\n\r\nsecret'
    )
    with rude_server(secret) as private:
        away = f"HTTP/1.1 307 Go\r\nLocation: http://127.0.0.1:{private}/\r\nContent-Length: 0\r\n"
        with rude_server(says(f"{away}\r\n".encode())) as port:
            use_bucket_endpoint(monkeypatch, port)
            store = obstore.store.S3Store(
                BUCKET,
                client_options={"allow_http": True, "timeout": timedelta(seconds=30)},
            )
            assert bytes(obstore.get(store, "a").bytes()) == b"secret"


# Redirects.


def redirect(location: str) -> Talk:
    head = f"HTTP/1.1 302 Go\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
    return says(head.encode())


@both
@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://127.0.0.1:9/", "private address"),
        ("https://127.0.0.1:9/", "private address"),
        ("http://localhost:9/", "private address"),
        ("http://0x7f000001/", "private address"),
        ("http://[::1]/", "private address"),
        ("http://[::ffff:10.0.0.1]/", "private address"),
        ("http://169.254.169.254/latest/meta-data/", "private address"),
        ("http://10.0.0.1/", "private address"),
        ("http://0.0.0.0/", "private address"),
        ("//192.168.0.1/", "private address"),
        ("ftp://8.8.8.8/", "no HTTPS"),
        ("file:///etc/passwd", "no HTTPS"),
        ("http://user:password@8.8.8.8/", "no plain host"),
        ("http://nobody.invalid/", "not known"),
        ("http://8.8.8.8:port/", "InvalidURL"),
        ("/again", "too often"),
    ],
)
def test_a_redirect_leads_to_public_places_only(
    scheme: str, location: str, said: str, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SourceFailed, match=said):
        fetch_from(scheme, redirect(location), staged, monkeypatch)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "64:ff9b:1::808:808",
        "2001::1",
    ],
)
def test_an_address_that_is_not_the_internets_is_private(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"],
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ip_address(address))


def test_a_hub_may_not_lead_to_another_private_host(hub: Hub, staged: Path) -> None:
    hub.commit("org/name", FILES)
    with serve(hub.app()) as other:
        hub.storage = f"http://127.0.0.1:{other}"
        with pytest.raises(SourceFailed, match="private address"):
            fetch("hf://org/name", staged)

    assert not any(path.startswith("/storage/") for path, _ in hub.asked)


@pytest.fixture
def authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """The certificate authority that the tests trust."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    return authority


@pytest.fixture
def storage(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> Iterator[FastAPI]:
    """Storage with HTTPS under the name `localhost`, which counts as public here: there is no
    other way to have a public server in a test."""
    monkeypatch.setattr(source_http, "is_public", lambda _: True)
    app = FastAPI()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    with serve(app, tls) as port:
        app.state.port = port
        yield app


def test_public_storage_is_asked_by_its_name_and_without_the_hubs_token(
    hub: Hub, storage: FastAPI, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("org/name", FILES)
    hub.storage = f"https://localhost:{storage.state.port}"
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    asked = []

    @storage.get("/{path:path}")
    def stored(path: str, request: Request) -> Response:
        asked.append((path, request.headers["Host"], request.headers.get("Authorization")))
        return Response(FILES["adapter_model.safetensors"])

    fetch("hf://org/name", staged)

    assert read(staged) == FILES
    name = "storage/org/name/0/adapter_model.safetensors"
    assert asked == [(name, f"localhost:{storage.state.port}", None)]
    assert {token for _, token in hub.asked} == {f"Bearer {HUB_TOKEN}"}


def test_storage_whose_certificate_has_another_name_is_not_believed(
    hub: Hub, storage: FastAPI, staged: Path
) -> None:
    hub.commit("org/name", FILES)
    hub.storage = f"https://127.0.0.1:{storage.state.port}"

    with pytest.raises(SourceFailed, match="ConnectError"):
        fetch("hf://org/name", staged)


def test_a_way_back_to_the_hub_has_no_token(
    hub: Hub, storage: FastAPI, staged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage server could use the token to read other repositories."""
    hub.commit("org/name", FILES)
    hub.commit("org/private", FILES)
    hub.private.add("org/private")
    hub.storage = f"https://localhost:{storage.state.port}"
    monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
    monkeypatch.delenv("HF_HUB_DISABLE_IMPLICIT_TOKEN")
    back = f"{os.environ['HF_ENDPOINT']}/org/private/resolve/main/adapter_config.json"

    @storage.get("/{path:path}")
    def stored(path: str) -> Response:
        return Response(status_code=302, headers={"Location": back, "X-Path": path})

    with pytest.raises(SourceRefused, match="401"):
        fetch("hf://org/name", staged)
    assert [token for path, token in hub.asked if "private" in path] == [None]
