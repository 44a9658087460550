"""Routes that tell orchestrators and Prometheus how the server is."""

import asyncio
import math
from typing import Literal

from anyio import to_thread
from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from infuse.adapters.errors import StoreUnreachable
from infuse.server.engine.errors import EngineDead
from infuse.server.errors import RETRY_SOON, ApiError
from infuse.server.openapi import errors
from infuse.server.services import ServicesDep

router = APIRouter(tags=["operations"])


PROBE_SECONDS = 5.0
"""Seconds in which the storage must answer a probe."""


class Health(BaseModel):
    status: Literal["ok"] = Field(description="All is well.", examples=["ok"])


class Readiness(Health):
    changes: Literal["accepted", "read_only"] = Field(
        description="Of adapters. `read_only`: their disk is mounted so, or became so by an error; "
        "what there is is served.",
        examples=["accepted"],
    )


_LIVE = errors(said={503: "The model has ended or hangs: restart the server."})


@router.get("/health", summary="Health, as vLLM's clients ask for it", responses=_LIVE)
@router.get("/health/live", responses=_LIVE)
async def live(services: ServicesDep) -> Health:
    """The process answers, and can compute. Where it says no, restart it."""
    if not services.engine.stats().alive:
        raise EngineDead
    return Health(status="ok")


@router.get("/health/ready", responses=errors(503))
async def ready(services: ServicesDep) -> Readiness:
    """Requests are welcome, and changes of adapters would last, or are refused for a disk that is
    read-only."""
    stats = services.engine.stats()
    if not stats.alive:
        raise EngineDead
    if not stats.ready:
        raise ApiError(
            503, "The server takes no requests now.", code="not_ready", headers=RETRY_SOON
        )
    if stats.overloaded:
        raise ApiError(
            503,
            f"The server is overloaded: {stats.waiting} requests wait ({stats.most_waiting} may), "
            f"and a new one would for about {math.ceil(stats.wait_seconds)} s.",
            code="overloaded",
            headers=RETRY_SOON,
        )
    try:
        # All probes share one thread: a disk that hangs holds no more, and not the server.
        async with asyncio.timeout(PROBE_SECONDS):
            await asyncio.get_running_loop().run_in_executor(
                services.probing, services.registry.stored.check
            )
    except TimeoutError:
        raise StoreUnreachable("The storage does not answer.") from None
    is_read_only = services.registry.stored.is_read_only
    return Readiness(status="ok", changes="read_only" if is_read_only else "accepted")


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors(401, 403, 429, 503) | {200: {"content": {"text/plain": {}}}},
)
async def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    text = await to_thread.run_sync(services.metrics.expose, limiter=services.scraping)
    if services.join_metrics is not None:
        text = await services.join_metrics(text)
    return Response(text, media_type="text/plain; version=0.0.4")
