"""The log's two formats, each as a process writes it."""

import json
import subprocess
import sys
from datetime import datetime
from typing import Any

import pytest

CODE = """
import logging, warnings
from server import request_id
from server.observability import logs

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
