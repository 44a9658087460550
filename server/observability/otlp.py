"""Decides whether traces are sent, by OpenTelemetry's own environment variables."""

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from infuse.server.observability.traces import Traces

log = logging.getLogger(__name__)

_PREFIX = "OTEL_EXPORTER_OTLP"
_PROTOCOL = "http/protobuf"


def open_traces(version: str) -> "Traces | None":
    """What sends traces; None where no collector is named. A collector that cannot be used is told
    of in the log: what sees the server must not keep it from starting."""
    named = _variable("ENDPOINT")
    if not named or _is("OTEL_SDK_DISABLED", "true") or _is("OTEL_TRACES_EXPORTER", "none"):
        return None
    protocol = _variable("PROTOCOL") or _PROTOCOL
    if protocol != _PROTOCOL:
        log.error("No traces are sent by %s: set %s_PROTOCOL=%s.", protocol, _PREFIX, _PROTOCOL)
        return None
    try:
        from infuse.server.observability.traces import Traces
    except ImportError as error:
        log.error("No traces are sent (%s): pip install 'infuse-server[otlp]'", error)
        return None
    log.info("Traces are sent over OTLP.")
    return Traces(version)


def _variable(name: str) -> str | None:
    """The variable of traces alone, or else that of all signals."""
    return os.environ.get(f"{_PREFIX}_TRACES_{name}") or os.environ.get(f"{_PREFIX}_{name}")


def _is(name: str, value: str) -> bool:
    return os.environ.get(name, "").lower() == value
