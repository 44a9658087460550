"""For orchestrators and for Prometheus."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

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
        raise ApiError(503, str(EngineDead()), code="engine_dead", headers={"Retry-After": "5"})
    return Health(status="ok")


@router.get("/health/ready", responses=errors(503))
async def ready(services: ServicesDep) -> Health:
    """Requests are welcome."""
    if not services.engine.stats().ready:
        raise ApiError(
            503, "The server takes no requests now.", code="not_ready", headers={"Retry-After": "5"}
        )
    return Health(status="ok")


@router.get(
    "/metrics",
    response_class=Response,
    responses=errors(401, 403, 429, 503) | {200: {"content": {"text/plain": {}}}},
)
def metrics(services: ServicesDep) -> Response:
    """Prometheus' text format."""
    return Response(services.metrics.expose(), media_type="text/plain; version=0.0.4")
