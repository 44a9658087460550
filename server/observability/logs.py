"""The log: one format for every line, of ours and of libraries, as text or as JSON."""

import json
import logging
import os
import re
from typing import Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from infuse.server import request_id

_KNOWN = (*RESERVED_ATTRS, "color_message", "vllm_process_name")
"""What a record has beside the fields that its caller gave: uvicorn adds colours for terminals, and
vLLM to every record the name of its process."""
_PLAIN = re.compile(r"[^\s\"=]+")


class _TextFormatter(logging.Formatter):
    """Writes a record's fields as `name=value` after its message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = {name: each for name, each in vars(record).items() if name not in _KNOWN}
        texts = [f"{name}={_quoted(str(each))}" for name, each in fields.items()]
        return " ".join([super().formatMessage(record), *texts])


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _add_request_id(record: logging.LogRecord) -> bool:
    """A filter that passes every record, with the id of the request that it is of."""
    current = request_id.current.get()
    if current is not None:
        record.request_id = current
    return True


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Write the log of this process to the standard error output."""
    handler = logging.StreamHandler()
    handler.addFilter(_add_request_id)
    handler.setFormatter(_json_formatter() if form == "json" else _text_formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    if form == "json":
        # Progress bars are no lines. tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_DISABLE", "1")


def take_over() -> None:
    """Have libraries that were imported meanwhile, and write lines of their own, write ours."""
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.handlers.clear()
            logger.propagate = True


def _text_formatter() -> logging.Formatter:
    return _TextFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _json_formatter() -> logging.Formatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        reserved_attrs=_KNOWN,
        timestamp="time",
    )
