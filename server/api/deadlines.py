"""How long a generation request may take: the seconds of its header, within the server's bound."""

import math
import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

from infuse.server.errors import ApiError
from infuse.server.observability import access
from infuse.server.services import ServicesDep

HEADER = "X-Request-Timeout"


@dataclass(frozen=True, slots=True)
class Deadline:
    """The time at which a request ends, whatever it does then."""

    seconds: float
    """How long the request may take, from the arrival of its headers."""
    at: float
    """When it ends, by `time.perf_counter`."""
    is_clients: bool
    """Whether the client has set it; otherwise the server's own bound counts."""

    @property
    def seconds_left(self) -> float:
        return self.at - time.perf_counter()

    def exceeded(self) -> ApiError:
        """The error of a request whose time is over."""
        allowed = f"its {HEADER}" if self.is_clients else "this server (--max-request-seconds)"
        message = (
            f"The request's time is over: {allowed} allows {self.seconds:g} s. Allow more, or ask "
            "for fewer tokens."
        )
        return ApiError(504, message, code="deadline_exceeded")


async def get_deadline(
    services: ServicesDep,
    asked: Annotated[
        float | None,
        Header(
            alias=HEADER,
            gt=0,
            allow_inf_nan=False,
            description="Seconds, from its arrival, that the request may take. When they are over "
            "it ends with 504, or its stream with an error; where the queue alone would take as "
            "long, it is refused at once with 429.",
            examples=[30],
        ),
    ] = None,
) -> Deadline:
    """FastAPI dependency: the deadline of the current request."""
    seconds = min(asked or math.inf, services.settings.max_request_seconds)
    return Deadline(seconds, access.arrived() + seconds, is_clients=seconds == asked)


DeadlineDep = Annotated[Deadline, Depends(get_deadline)]
