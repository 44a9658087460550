"""nginx and Caddy as in the examples, before a real server: streams, uploads, waits, access."""

import getpass
import http.server
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM

from infuse.server.settings import Settings
from tests.api.conftest import save_model
from tests.api.oracle import upload
from tests.api.stores import complete, text_of
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.factories import save_adapter
from tests.failing_server import WAITING
from tests.served import address_of

FOLDER = Path(__file__).parents[2] / "deploy" / "proxies"
SERVERS = ("127.0.0.1:8000", "127.0.0.1:8001")
NAME = "infuse.example.com"
PUBLIC, INSIDE = "127.0.0.2", "127.0.0.1"
"""Addresses of clients, both of this machine. The examples let the second one in."""
LONG = {
    "model": "tiny",
    "prompt": "A",
    "max_tokens": 30_000,
    "stream": True,
    "logit_bias": {"70": 100},
}
"""An answer of one letter, again and again: no text waits for the rest of a character."""


@dataclass
class Served:
    address: str
    log: Path
    what: Path
    """What the model is to do from now on: see tests/failing_server.py."""

    def client(self) -> httpx.Client:
        """Past the proxy."""
        return httpx.Client(base_url=f"http://{self.address}", timeout=60)

    @contextmanager
    def waiting(self, before: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Within, the model waits. `before`: what has the model compute."""
        self.what.write_text("waits")
        try:
            before()
            assert eventually(lambda: self.what.read_text() == WAITING)
            yield
        finally:
            self.what.unlink()


@dataclass
class Proxied:
    name: str
    server: Served
    public: httpx.Client
    inside: httpx.Client


class Refusing(http.server.BaseHTTPRequestHandler):
    """A server that is being stopped."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=32_768)


@pytest.fixture(scope="module")
def adapter_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    return save_adapter(base, tmp_path_factory.mktemp("adapter") / "saved")


@contextmanager
def served(folder: Path, model: Path) -> Iterator[Served]:
    log, what = folder / "log", folder / "what"
    command = [sys.executable, "-m", "tests.failing_server", str(what), "serve", "--port=0"]
    command += [f"--model={model}", "--served-model-name=tiny", "--max-batch-rows=2"]
    command += [f"--adapters-dir={folder / 'store'}", "--kv-cache-tokens=65536"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = address_of(process, log)
        yield Served(url.removeprefix("http://"), log, what)
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((INSIDE, 0))
        port: int = taken.getsockname()[1]
        return port


def nginx(folder: Path, text: str, port: int) -> tuple[list[str], Path]:
    """The command that runs it, and the certificate by which it is known."""
    certificate, key = folder / "infuse.crt", folder / "infuse.key"
    new_certificate = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate}"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*new_certificate.split(), *subject], check=True, capture_output=True)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    text = text.replace("http {\n", f"http {{\naccess_log off;\n{own}")
    text = text.replace("listen 443 ssl", f"listen {port} ssl").replace(
        "/etc/nginx/tls", str(folder)
    )
    config = folder / "nginx.conf"
    config.write_text(text)
    # What nginx keeps of a body, it writes as a user who must get to the folder.
    directives = f"daemon off; user {getpass.getuser()}; pid {folder / 'pid'};"
    return ["nginx", "-e", "stderr", "-c", str(config), "-g", directives], certificate


def caddy(folder: Path, text: str, port: int) -> tuple[list[str], Path]:
    options = f"admin off\nskip_install_trust\nhttps_port {port}\nhttp_port {free_port()}\n"
    config = folder / "Caddyfile"
    config.write_text(f"{{\n{options}}}\n{text}")
    command = ["caddy", "run", "--adapter", "caddyfile", "--config", str(config)]
    return command, folder / "caddy/pki/authorities/local/root.crt"


PROXIES = {"nginx.conf": nginx, "Caddyfile": caddy}


@contextmanager
def proxied(example: str, folder: Path, server: Served, other: str) -> Iterator[Proxied]:
    """Within: the proxy of an example runs before a server and another one."""
    program = PROXIES[example].__name__
    for each in (program, "openssl"):
        if shutil.which(each) is None:
            pytest.skip(f"needs {each}: apt-get install {each}")
    port = free_port()
    text = (FOLDER / example).read_text().replace(NAME, "localhost")
    for ours, theirs in zip(SERVERS, (other, server.address), strict=True):
        assert ours in text
        text = text.replace(ours, theirs)
    command, certificate = PROXIES[example](folder, text, port)
    log = folder / "proxy.log"
    own = {"XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "HOME": str(folder)}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | own)
    try:
        assert eventually(lambda: listens(port) and certificate.exists(), 30), log.read_text()
        trust = ssl.create_default_context(cafile=str(certificate))
        with ExitStack() as clients:
            public, inside = (
                clients.enter_context(
                    httpx.Client(
                        base_url=f"https://localhost:{port}",
                        transport=httpx.HTTPTransport(verify=trust, local_address=address),
                        timeout=60,
                    )
                )
                for address in (PUBLIC, INSIDE)
            )
            assert eventually(lambda: answers(public), 30), log.read_text()
            yield Proxied(program, server, public, inside)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def answers(client: httpx.Client) -> bool:
    """False while Caddy makes its certificate."""
    with suppress(httpx.ConnectError):
        return complete(client, "tiny").is_success
    return False


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((INSIDE, port)) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("server"), model_folder) as server:
        yield server


@pytest.fixture(scope="module", params=PROXIES)
def proxy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, server: Served
) -> Iterator[Proxied]:
    """Of the two servers that the example names, one is not there."""
    folder = tmp_path_factory.mktemp("proxy")
    with proxied(request.param, folder, server, f"127.0.0.1:{free_port()}") as proxy:
        yield proxy


def test_an_answer_through_the_proxy_is_the_servers_own(proxy: Proxied) -> None:
    with proxy.server.client() as direct:
        assert text_of(proxy.public, "tiny") == text_of(direct, "tiny")
    assert proxy.public.get("/health/ready").json()["status"] == "ok"
    assert proxy.public.get("/v1/models/tiny").json()["id"] == "tiny"


def test_every_request_goes_to_the_server_that_is_there(proxy: Proxied) -> None:
    assert {complete(proxy.public, "tiny").status_code for _ in range(8)} == {200}


@pytest.mark.parametrize("example", PROXIES)
def test_no_generation_request_is_left_with_a_server_that_takes_none(
    example: str, tmp_path: Path, server: Served
) -> None:
    with http.server.ThreadingHTTPServer((INSIDE, 0), Refusing) as refusing:
        thread = threading.Thread(target=refusing.serve_forever)
        thread.start()
        other = f"{INSIDE}:{refusing.server_port}"
        try:
            with proxied(example, tmp_path, server, other) as proxy:
                # Caddy looks every two seconds which of them are ready.
                assert eventually(lambda: {complete_status(proxy) for _ in range(8)} == {200})
                assert {complete_status(proxy) for _ in range(16)} == {200}
        finally:
            refusing.shutdown()
            thread.join()


def complete_status(proxy: Proxied) -> int:
    return complete(proxy.public, "tiny").status_code


def test_tokens_are_not_kept_back_while_more_are_computed(proxy: Proxied) -> None:
    """The model waits in the midst of an answer: the client has all that was computed."""
    with proxy.public.stream("POST", COMPLETIONS, json=LONG, timeout=20) as answer:
        events = (line for line in answer.iter_lines() if line.startswith("data: {"))
        text = text_in(next(events))
        with proxy.server.waiting(), proxy.server.client() as direct:
            [running] = direct.get("/debug/batch").json()["running"]
            while len(text) < running["completion_tokens"]:
                text += text_in(next(events))


def text_in(event: str) -> str:
    return str(json.loads(event.removeprefix("data: "))["choices"][0]["text"])


def test_a_request_whose_client_leaves_ends(proxy: Proxied) -> None:
    with proxy.server.client() as direct:

        def running() -> int:
            return len(direct.get("/debug/batch").json()["running"])

        with proxy.public.stream("POST", COMPLETIONS, json=LONG) as answer:
            assert answer.status_code == 200, answer.read()
            # A reader that is let go would close the stream.
            lines = answer.iter_lines()
            next(lines)
            assert running() == 1
        assert eventually(lambda: running() == 0)


@pytest.mark.parametrize("seconds", [1, pytest.param(90, marks=pytest.mark.full)])
def test_a_client_may_wait_long_for_an_answer(proxy: Proxied, seconds: float) -> None:
    """nginx gives up after a minute where nothing else is said."""
    with ThreadPoolExecutor(1) as thread:
        with proxy.server.waiting(before=lambda: thread.submit(complete, proxy.public, "tiny")):
            threading.Event().wait(seconds)
        assert complete_status(proxy) == 200


def test_nginx_waits_for_the_longest_request_and_takes_the_largest_bodies() -> None:
    text = (FOLDER / "nginx.conf").read_text()
    [seconds] = re.findall(r"proxy_read_timeout (\d+)s;", text)
    uploads, bodies = re.findall(r"client_max_body_size (\d+)m;", text)

    assert int(seconds) > Settings().max_request_seconds
    assert int(uploads) << 20 > Settings().max_upload_bytes
    assert int(bodies) << 20 == Settings().max_body_bytes


def test_an_uploaded_adapter_answers(proxy: Proxied, adapter_folder: Path) -> None:
    name = f"by-{proxy.name}"
    assert upload(proxy.inside, name, adapter_folder).status_code == 201
    assert complete(proxy.public, name).headers["Infuse-Adapter"] == f"{name}@1"


def test_what_the_server_says_of_a_large_upload_arrives(proxy: Proxied) -> None:
    files = {"config": b"{}", "weights": b"x" * (8 << 20)}
    answer = proxy.inside.post("/v1/adapters", data={"name": "large"}, files=files)

    assert answer.status_code == 400
    assert "adapter_config.json" in answer.text


def test_a_body_that_is_too_large_is_refused(proxy: Proxied) -> None:
    """nginx says so itself. Caddy passes the body on as it comes, and the server's 413 back."""
    body = {"model": "tiny", "prompt": "A" * (Settings().max_body_bytes + 1)}

    assert proxy.public.post(COMPLETIONS, json=body).status_code == 413


@pytest.mark.parametrize(
    "path", ["/v1/adapters", "/v1/merges", "/v1/usage", "/metrics", "/debug/batch", "/docs"]
)
def test_only_clients_from_inside_reach_what_is_not_for_the_public(
    proxy: Proxied, path: str
) -> None:
    assert proxy.public.get(path).status_code == 403
    assert proxy.inside.get(path).status_code != 403


def test_the_server_sees_the_address_of_the_client_and_not_one_that_it_claims(
    proxy: Proxied,
) -> None:
    body = {"model": "tiny", "prompt": "A", "max_tokens": 1}
    named = {"X-Forwarded-For": "192.0.2.1", "X-Request-Id": f"asks-{proxy.name}"}
    assert proxy.public.post(COMPLETIONS, json=body, headers=named).status_code == 200

    def line() -> str:
        lines = proxy.server.log.read_text().splitlines()
        return next((each for each in lines if f"asks-{proxy.name}" in each), "")

    assert eventually(lambda: f"client={PUBLIC}" in line()), line()
