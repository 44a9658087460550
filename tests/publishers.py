"""Servers that adapters are fetched from: a hub, a bucket, and some that are hostile."""

import contextlib
import hashlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from moto.server import ThreadedMotoServer

BUCKET = "published"
HUB_TOKEN = "hf_a-secret-token"
Files = dict[str, bytes]


@contextlib.contextmanager
def serve(app: Any, tls: ssl.SSLContext | None = None) -> Iterator[int]:
    """Any ASGI application on a free port of 127.0.0.1, which is yielded."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="warning", lifespan="off")
    if tls is not None:
        config.load()
        config.ssl = tls
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


@dataclass
class Hub:
    """What a hub's `resolve` route answers: files by commit, some of them elsewhere, in storage."""

    repositories: dict[str, list[Files]] = field(default_factory=dict)
    """`org/name` -> the commits, oldest first; `main` is the last one."""
    private: set[str] = field(default_factory=set)
    storage: str = ""
    """Where weights are redirected to; "" for this server itself."""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Authorization of each request."""

    def commit(self, repository: str, files: Files) -> str:
        self.repositories.setdefault(repository, []).append(files)
        return self.commit_id(repository, len(self.repositories[repository]) - 1)

    @staticmethod
    def commit_id(repository: str, number: int) -> str:
        return hashlib.sha1(f"{repository}@{number}".encode()).hexdigest()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/{org}/{name}/resolve/{revision}/{path:path}")
        def resolve(org: str, name: str, revision: str, path: str, request: Request) -> Response:
            self.asked.append((request.url.path, request.headers.get("Authorization")))
            repository = f"{org}/{name}"
            allowed = request.headers.get("Authorization") == f"Bearer {HUB_TOKEN}"
            if repository not in self.repositories or (repository in self.private and not allowed):
                return Response(status_code=401, headers={"X-Error-Code": "RepoNotFound"})
            commits = self.repositories[repository]
            names = {self.commit_id(repository, n): files for n, files in enumerate(commits)}
            names["main"] = commits[-1]
            if revision not in names:
                return Response(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})
            number = commits.index(names[revision])
            headers = {"X-Repo-Commit": self.commit_id(repository, number)}
            if path not in names[revision]:
                headers["X-Error-Code"] = "EntryNotFound"
                return Response(status_code=404, headers=headers)
            if path.endswith(".safetensors"):
                headers["Location"] = f"{self.storage}/storage/{repository}/{number}/{path}"
                return Response(status_code=302, headers=headers)
            return Response(names[revision][path], headers=headers)

        @app.get("/storage/{org}/{name}/{number}/{path:path}")
        def stored(org: str, name: str, number: int, path: str, request: Request) -> Response:
            self.asked.append((request.url.path, request.headers.get("Authorization")))
            return Response(self.repositories[f"{org}/{name}"][number][path])

        return app


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """`HF_ENDPOINT` is this hub."""
    hub = Hub()
    with serve(hub.app()) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
        yield hub


def use_bucket_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> str:
    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-access-key")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    return endpoint


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """An empty bucket of a server that speaks S3; called, it puts an object."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        endpoint = use_bucket_endpoint(monkeypatch, server.get_host_and_port()[1])
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        keys: set[str] = set()

        def put(key: str, data: bytes) -> None:
            client.put_object(Bucket=BUCKET, Key=key, Body=data)
            keys.add(key)

        yield put
        # moto keeps what it holds beyond its server's end.
        for key in keys:
            client.delete_object(Bucket=BUCKET, Key=key)
        client.delete_bucket(Bucket=BUCKET)
    finally:
        server.stop()


Talk = Callable[[socket.socket], None]


@contextlib.contextmanager
def rude_server(talk: Talk) -> Iterator[int]:
    """A server that reads each request and then does as `talk` says; yields its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    stopped = threading.Event()
    connections: list[socket.socket] = []

    def answer(connection: socket.socket) -> None:
        # The other side goes away in the midst of it: that is what is tested.
        with contextlib.suppress(OSError), connection:
            connection.recv(1 << 16)
            talk(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while not stopped.is_set():
                connection, _ = listening.accept()
                connections.append(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        stopped.set()
        for each in (*connections, listening):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        thread.join(10)


def says(answer: bytes) -> Talk:
    return lambda connection: connection.sendall(answer)


def hangs(connection: socket.socket) -> None:
    """Says nothing until the other side has gone."""
    connection.recv(1)


def drips(connection: socket.socket) -> None:
    """Sends a header that never ends, a little at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    connection.settimeout(0.02)
    while True:
        connection.sendall(b"X-A: b\r\n")
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1):
                return


def never_ends(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"{" * 4096)
