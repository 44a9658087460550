"""The log's two formats, each as a process writes it, and a log that cannot be written."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.test_streaming import eventually
from tests.factories import save_tiny_model

CODE = """
import logging, warnings
from infuse.server import request_id
from infuse.server.observability import logs

logs.set_up("info", FORMAT)
log = logging.getLogger("some.library")
log.debug("Too little to say.")
log.info("It has %d parts.", 3)
request_id.current.set("abc-1")
added = {"color_message": "red", "vllm_process_name": "x"}
log.warning("Odd", extra={"path": 'a "b"', "seconds": 0.5, **added})
warnings.warn("Old.")
try:
    raise KeyError("gone")
except KeyError:
    log.exception("Failed.")
"""


def written(form: str) -> list[str]:
    """The lines that the code writes to the standard error output."""
    code = CODE.replace("FORMAT", repr(form))
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout == ""
    return process.stderr.splitlines()


def test_text_has_the_fields_of_a_line_after_its_message() -> None:
    first, second, *rest = written("text")

    assert first.endswith(" INFO some.library: It has 3 parts.")
    assert second.endswith(
        r' WARNING some.library: Odd path="a \"b\"" seconds=0.5 request_id=abc-1'
    )
    assert any("py.warnings: " in line and "Old." in line for line in rest)
    failed = next(index for index, line in enumerate(rest) if "Failed." in line)
    assert rest[failed].endswith("ERROR some.library: Failed. request_id=abc-1")
    assert rest[failed + 1].startswith("Traceback")


def test_json_is_one_object_a_line_with_the_same_fields() -> None:
    first, second, warning, failed = map(json.loads, written("json"))

    time = datetime.fromisoformat(first.pop("time"))
    assert time.tzinfo is not None
    assert first == {"level": "INFO", "logger": "some.library", "message": "It has 3 parts."}
    fields: dict[str, Any] = {"path": 'a "b"', "seconds": 0.5, "request_id": "abc-1"}
    assert second.items() >= fields.items()
    assert not {"color_message", "vllm_process_name"} & second.keys()
    assert (warning["level"], warning["logger"]) == ("WARNING", "py.warnings")
    assert failed["exc_info"].startswith("Traceback")
    assert failed["request_id"] == "abc-1"


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_break_in_a_field_makes_no_line(form: str) -> None:
    code = (
        f"import logging\nfrom server.observability import logs\nlogs.set_up('info', {form!r})\n"
        "logging.getLogger('a').info('x', extra={'key': 'a\\nERROR root: forged'})"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    assert len(process.stderr.splitlines()) == 1


def test_a_library_that_writes_lines_of_its_own_writes_ours() -> None:
    code = (
        "import logging\nfrom server.observability import logs\nlogs.set_up('info', 'json')\n"
        "library = logging.getLogger('library')\nlibrary.propagate = False\n"
        "library.addHandler(logging.StreamHandler())\n"
        "logs.take_over()\nlibrary.warning('Once.')"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )

    [line] = process.stderr.splitlines()
    assert json.loads(line)["message"] == "Once."


@pytest.fixture
def full() -> Iterator[int]:
    """A file on a disk without room."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader has ended."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.mark.fault(
    "disk",
    "The disk of the log is full",
    by="`/dev/full` as the standard error output",
    promise="The server starts, answers, and stops in order.",
    case="full",
)
@pytest.mark.fault(
    "process",
    "What reads the log has ended",
    by="a pipe without a reader as the standard error output",
    promise="The server starts, answers, and stops in order.",
    case="unread",
)
@pytest.mark.parametrize("log", ["full", "unread"])
def test_a_log_that_cannot_be_written_keeps_no_server_from_answering(
    request: pytest.FixtureRequest, tmp_path: Path, log: str
) -> None:
    output = request.getfixturevalue(log)
    model = save_tiny_model(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from infuse.server.cli import main; main()", "serve"]
    command += ["--port", str(port), "--model", str(model), "--served-model-name", "tiny"]
    command += ["--adapters-dir", str(tmp_path / "store")]
    server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: server.poll() is not None or answers(url), 240)
        body = {"model": "tiny", "prompt": "A", "max_tokens": 2}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
        server.terminate()
        # Python's own status where it cannot flush the standard error output.
        assert server.wait(60) in (0, 120)
    finally:
        server.kill()
        server.wait()


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health/live").status_code == 200
    return False
