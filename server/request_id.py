"""The id of an HTTP request: its client's or one of ours, in its answer and in each line of the
log."""

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import Headers

HEADER = "X-Request-Id"
current: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that a task, or a thread that it started, works for."""
_SANE = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def id_of(headers: Headers) -> str:
    """The client's id where it is short and plain, otherwise a new one."""
    given = headers.get(HEADER, "")
    return given if _SANE.fullmatch(given) else uuid.uuid4().hex
