"""What an upload's form may hold, and which names."""

import httpx
import pytest

from tests.api.archives import form_of
from tests.api.conftest import RunningServer
from tests.api.test_adapters import ADAPTERS
from tests.api.test_uploads import Files, add, faults_of, on_disk, refused
from tests.api.test_uploads import alone as alone
from tests.api.test_uploads import files as files
from tests.api.test_uploads import (
    nothing_stays_and_nobody_is_disturbed as nothing_stays_and_nobody_is_disturbed,
)

NAMES = [
    "",
    ".",
    "..",
    "../x",
    "a/b/c",
    "a\\b",
    "/etc",
    "-a",
    "_a",
    ".a",
    "a b",
    "a\n",
    "a\x00",
    "é",
    "名",
    "\u202ea",
    "a@1",
    "a%2Fb",
]


@refused
@pytest.mark.parametrize(
    "name",
    [*NAMES, "x" * 129, "x" * 100_000],
    ids=lambda name: ascii(name[:10]),
)
def test_a_name_that_is_a_path_or_no_plain_word_is_refused(
    client: httpx.Client, files: Files, name: str
) -> None:
    response = add(client, files, name)

    [fault] = faults_of(response)
    assert fault["field"] == "name"
    assert "is no adapter name" in fault["problem"]
    assert "letters, digits" in fault["fix"]
    assert len(response.content) < 2000


@pytest.mark.parametrize("name", ["a" * 129, "..%2Fdefault", "default%2F..", "%00", "é"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_such_a_name_is_found_nowhere(
    client: httpx.Client, server: RunningServer, files: Files, name: str, method: str
) -> None:
    before = on_disk(server)
    body = {"files": form_of(files)} if method == "PUT" else {}

    response = client.request(method, f"{ADAPTERS}/{name}", **body)

    assert response.status_code in (400, 404)
    assert on_disk(server) == before


File = tuple[str | None, bytes]
FORMS: dict[str, tuple[list[tuple[str, File]], str, str]] = {
    "no files": ([], "files", "no files"),
    "config alone": ([("config", ("c", b"{}"))], "files", "['config']"),
    "weights alone": ([("weights", ("w", b""))], "files", "['weights']"),
    "all three": (
        [("config", ("c", b"{}")), ("weights", ("w", b"")), ("archive", ("a", b""))],
        "files",
        "['archive', 'config', 'weights']",
    ),
    "config as text": (
        [("config", (None, b"{}")), ("weights", ("w", b""))],
        "config",
        "is text, not a file",
    ),
    "twice": (
        [("config", ("c", b"{}")), ("config", ("c", b"{}")), ("weights", ("w", b""))],
        "config",
        "more than once",
    ),
    "two names": (
        [("name", (None, b"other")), ("archive", ("a", b""))],
        "name",
        "more than once",
    ),
    "unknown field": (
        [("archive", ("a", b"")), ("tags", (None, b"x"))],
        "tags",
        "is no field of this form",
    ),
    "unknown file": (
        [("archive", ("a", b"")), ("readme", ("r", b"x"))],
        "readme",
        "is no field of this form",
    ),
}


@refused
@pytest.mark.parametrize(("parts", "field", "problem"), FORMS.values(), ids=FORMS)
def test_a_form_that_is_not_the_api_s_is_refused(
    client: httpx.Client, parts: list[tuple[str, File]], field: str, problem: str
) -> None:
    name: tuple[str, File] = ("name", (None, b"refused"))

    [fault] = faults_of(client.post(ADAPTERS, files=[name, *parts]))

    assert fault["field"] == field
    assert problem in fault["problem"]
    assert fault["fix"]


@refused
def test_an_upload_without_a_name_is_refused(client: httpx.Client, files: Files) -> None:
    [fault] = faults_of(client.post(ADAPTERS, files=form_of(files)))

    assert (fault["field"], fault["problem"]) == ("name", "is missing")


def test_a_new_revision_has_its_name_in_the_path_alone(client: httpx.Client, files: Files) -> None:
    form = form_of(files)

    [fault] = faults_of(client.put(f"{ADAPTERS}/mlp", data={"name": "mlp"}, files=form))

    assert fault["field"] == "name"
    assert client.get(f"{ADAPTERS}/mlp").json()["revision"] == 1


MULTIPART = "multipart/form-data"
BODIES = {
    "nothing": (None, b""),
    "JSON": ("application/json", b'{"name": "a", "source": "hub"}'),
    "url-encoded": ("application/x-www-form-urlencoded", b"name=a"),
    "no boundary": (MULTIPART, b"--x\r\n\r\n"),
    "empty": (f"{MULTIPART}; boundary=x", b""),
    "no end": (f"{MULTIPART}; boundary=x", b'--x\r\nContent-Disposition: form-data; name="a"'),
    "no disposition": (f"{MULTIPART}; boundary=x", b"--x\r\n\r\nhello\r\n--x--\r\n"),
    "not at all": (f"{MULTIPART}; boundary=x", b"\0\1\2\3" * 100),
    "bad charset": (f"{MULTIPART}; boundary=x; charset=nope", b"--x--\r\n"),
    "long boundary": (f"{MULTIPART}; boundary={'x' * 10_000}", b"--x--\r\n"),
}


@refused
@pytest.mark.parametrize(("kind", "body"), BODIES.values(), ids=BODIES)
def test_a_body_that_is_no_whole_form_is_refused(
    client: httpx.Client, kind: str | None, body: bytes
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}

    response = client.post(ADAPTERS, content=body, headers=headers)

    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@refused
def test_a_thousand_fields_are_refused(client: httpx.Client) -> None:
    parts = [(f"f{number}", (None, b"x")) for number in range(1000)]

    assert client.post(ADAPTERS, files=parts).status_code == 400
