"""For orchestrators and for Prometheus."""

from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from adapters.errors import StoreUnreachable
from server.engine.errors import EngineDead
from server.errors import ApiError
from server.openapi import errors
from server.services import Services, get_services

router = APIRouter(tags=["operations"])

ServicesDep = Annotated[Services, Depends(get_services)]


class Health(BaseModel):
    status: Literal["ok"] = Field(description="All is well.", examples=["ok"])


@router.get(
    "/health/live", responses=errors(said={503: "The model thread has ended: restart the server."})
)
async def live(services: ServicesDep) -> Health:
    """The process answers, and can compute. Where it says no, restart it."""
    if not services.engine.stats().alive:
        raise EngineDead
    return Health(status="ok")


@router.get("/health/ready", responses=errors(503))
async def ready(services: ServicesDep) -> Health:
    """Requests are welcome, and changes of adapters would last."""
    if not services.engine.stats().ready:
        raise ApiError(
            503, "The server takes no requests now.", code="not_ready", headers={"Retry-After": "5"}
        )
    try:
        # On a thread of its own: a disk that hangs must not stop the server too.
        await to_thread.run_sync(services.store.check, limiter=services.probing)
    except StoreUnreachable as error:
        raise ApiError(
            503, str(error), code="storage_unavailable", headers={"Retry-After": "5"}
        ) from None
    return Health(status="ok")


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors(401, 403, 429, 503) | {200: {"content": {"text/plain": {}}}},
)
def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    return Response(services.metrics.expose(), media_type="text/plain; version=0.0.4")
