"""A unix socket in place of a port, and TLS, as `infuse serve` opens them."""

import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from infuse.server.listener import MAX_HEAD_BYTES
from tests.certificates import Certificates, certificates
from tests.factories import save_tiny_model
from tests.served import address_of

INFUSE = Path(sys.executable).with_name("infuse")
COMPLETIONS = "/v1/completions"
BODY = {"model": "tiny", "prompt": "A", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


Serve = Callable[..., tuple["subprocess.Popen[bytes]", str]]


@pytest.fixture
def serve(model_folder: Path, tmp_path: Path) -> Iterator[Serve]:
    """Start `infuse serve` with these options; the process, and the URL that it tells."""
    with ExitStack() as servers:

        def serve(*options: str | Path) -> tuple["subprocess.Popen[bytes]", str]:
            command = [INFUSE, "serve", "--model", model_folder, "--served-model-name", "tiny"]
            log = tmp_path / "log"
            with log.open("w") as output:
                server = subprocess.Popen(
                    [*command, "--adapters-dir", tmp_path / "store", *options],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            servers.callback(server.wait)
            servers.callback(server.kill)
            return server, address_of(server, log)

        yield serve


def over(path: Path) -> httpx.Client:
    return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://infuse")


def test_a_unix_socket_serves_and_goes_with_the_server(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "infuse.sock"
    with socket.socket(socket.AF_UNIX) as left_by_one_that_was_killed:
        left_by_one_that_was_killed.bind(str(path))
    server, url = serve("--uds", path)

    assert url == f"http+unix://{path}"
    with over(path) as client:
        assert client.post(COMPLETIONS, json=BODY).json()["usage"]["completion_tokens"] == 4
        with client.stream("POST", COMPLETIONS, json=BODY | {"stream": True}) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")
        assert client.get("/metrics").status_code == 200
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert not path.exists()


def test_a_unix_socket_in_use_and_a_file_are_refused(tmp_path: Path) -> None:
    used, file = tmp_path / "used.sock", tmp_path / "file"
    file.touch()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(used))
        other.listen()
        for path in (used, file):
            refused = subprocess.run(
                [INFUSE, "serve", "--uds", path], capture_output=True, text=True, check=False
            )
            assert refused.returncode == 2
            assert (
                refused.stderr == f"infuse serve: cannot listen on {path}: Address already in use\n"
            )
            assert path.exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@contextmanager
def trusting(made: Certificates, own: Path | None = None) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=str(made.authority))
    if own is not None:
        context.load_cert_chain(own)
    with httpx.Client(verify=context) as client:
        yield client


def test_tls_serves_those_who_trust_its_authority_and_asks_for_their_certificate(
    serve: Serve, made: Certificates
) -> None:
    tls = ["--ssl-certfile", made.server, "--ssl-ca-certs", made.authority]
    _, url = serve("--port", "0", *tls)

    assert url.startswith("https://127.0.0.1:")
    with trusting(made, made.client) as client:
        assert client.post(url + COMPLETIONS, json=BODY).json()["usage"]["completion_tokens"] == 4
        with client.stream("POST", url + COMPLETIONS, json=BODY | {"stream": True}) as stream:
            assert stream.read().endswith(b"data: [DONE]\n\n")
        too_large = {"content": b"x" * (8 << 20), "headers": {"Connection": "close"}}
        assert client.post(url + COMPLETIONS, **too_large).status_code == 413
    with trusting(made) as stranger, pytest.raises(httpx.TransportError):
        stranger.get(f"{url}/health/live")
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"{url}/health/live")


def test_over_tls_headers_that_are_too_large_are_refused_before_they_end(
    serve: Serve, made: Certificates, tmp_path: Path
) -> None:
    server, url = serve("--port", "0", "--ssl-certfile", made.server)
    address = httpx.URL(url)
    context = ssl.create_default_context(cafile=str(made.authority))

    with (
        socket.create_connection((address.host, address.port)) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as connection,
    ):
        # All of it is there when the server reads on.
        server.send_signal(signal.SIGSTOP)
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"x" * 2 * MAX_HEAD_BYTES)
        server.send_signal(signal.SIGCONT)
        assert b" 431 " in connection.recv(4096)
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
