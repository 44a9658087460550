"""Decides whether traces and metrics are sent, by OpenTelemetry's own environment variables."""

import logging
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from prometheus_client import Metric

if TYPE_CHECKING:
    from infuse.server.observability.sent_metrics import SentMetrics
    from infuse.server.observability.traces import Traces

log = logging.getLogger(__name__)

_PREFIX = "OTEL_EXPORTER_OTLP"
_PROTOCOL = "http/protobuf"
_Signal = Literal["traces", "metrics"]


def open_traces(version: str) -> "Traces | None":
    """What sends traces; None where no collector is named. A collector that cannot be used is told
    of in the log: what sees the server must not keep it from starting."""
    if not _is_asked_for("traces"):
        return None
    try:
        from infuse.server.observability.traces import Traces
    except ImportError as error:
        _tell_missing("traces", error)
        return None
    log.info("Traces are sent over OTLP.")
    return Traces(version)


def open_metrics(families: Callable[[], Iterable[Metric]], version: str) -> "SentMetrics | None":
    """What sends metrics; otherwise as `open_traces`. `families`: reads all metrics."""
    if not _is_asked_for("metrics"):
        return None
    try:
        from infuse.server.observability.sent_metrics import SentMetrics
    except ImportError as error:
        _tell_missing("metrics", error)
        return None
    log.info("Metrics are sent over OTLP.")
    return SentMetrics(families, version)


def _is_asked_for(signal: _Signal) -> bool:
    named = _variable(signal, "ENDPOINT")
    is_off = _is(f"OTEL_{signal.upper()}_EXPORTER", "none") or _is("OTEL_SDK_DISABLED", "true")
    if not named or is_off:
        return False
    protocol = _variable(signal, "PROTOCOL") or _PROTOCOL
    if protocol != _PROTOCOL:
        told = "No %s are sent by %s: set %s_PROTOCOL=%s."
        log.error(told, signal, protocol, _PREFIX, _PROTOCOL)
        return False
    return True


def _tell_missing(signal: _Signal, error: ImportError) -> None:
    log.error("No %s are sent (%s): pip install 'infuse-server[otlp]'", signal, error)


def _variable(signal: _Signal, name: str) -> str | None:
    """The variable of one signal alone, or else that of all."""
    own = os.environ.get(f"{_PREFIX}_{signal.upper()}_{name}")
    return own or os.environ.get(f"{_PREFIX}_{name}")


def _is(name: str, value: str) -> bool:
    return os.environ.get(name, "").lower() == value
