"""Shows what adapters do: their vectors in numbers, and how alike they are."""

from typing import Annotated

from fastapi import APIRouter, Query

from infuse.adapters.checkpoint.checkpoint import AdapterVectors
from infuse.adapters.derive.combine import combine
from infuse.adapters.derive.summary import similarity
from infuse.server.api.adapters import SeenName
from infuse.server.api.model_schemas import AdapterWeight
from infuse.server.api.vector_schemas import (
    COLUMNS,
    MAX_COLUMNS,
    CombinedVectorsBody,
    Similarity,
    SimilarityBody,
    Vectors,
)
from infuse.server.auth import CallerDep
from infuse.server.openapi import READS, errors
from infuse.server.services import Services, ServicesDep

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])


@router.get("/{name:adapter}/vectors", summary="Show vectors", responses=errors(404, *READS))
def show(
    name: SeenName,
    services: ServicesDep,
    revision: Annotated[
        int | None, Query(ge=1, description="Default: the current one.", examples=[2])
    ] = None,
    columns: Annotated[int, Query(ge=0, le=MAX_COLUMNS, description=COLUMNS, examples=[64])] = 0,
) -> Vectors:
    """What an adapter amplifies and inhibits, by module."""
    label, vectors = _read(services, name if revision is None else f"{name}@{revision}")
    return Vectors.of(vectors, [AdapterWeight(name=label)], columns)


@router.post("/vectors", summary="Show the vectors of a combination", responses=errors(404, *READS))
def show_combined(body: CombinedVectorsBody, services: ServicesDep, caller: CallerDep) -> Vectors:
    """What `/v1/adapters/combine` would make of adapters, by module. Nothing is stored."""
    for part in body.adapters:
        caller.check_sees(part.name)
    read = [_read(services, part.name) for part in body.adapters]
    vectors = combine([vectors for _, vectors in read], body.recipe)
    parts = [
        AdapterWeight(name=label, weight=part.weight)
        for (label, _), part in zip(read, body.adapters, strict=True)
    ]
    return Vectors.of(vectors, parts, body.columns)


@router.post("/similarity", summary="Compare adapters", responses=errors(404, *READS))
def compare(body: SimilarityBody, services: ServicesDep, caller: CallerDep) -> Similarity:
    """The cosines between what adapters change."""
    for name in body.adapters:
        caller.check_sees(name)
    read = [_read(services, name) for name in body.adapters]
    return Similarity(
        adapters=[label for label, _ in read],
        similarity=similarity([vectors for _, vectors in read]),
    )


def _read(services: Services, model: str) -> tuple[str, AdapterVectors]:
    """An adapter's name with its revision, and its vectors, also where it is disabled."""
    revision = services.registry.find(model)
    return f"{revision.name}@{revision.number}", services.registry.vectors(revision)
