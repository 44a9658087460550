"""`POST /v1/embeddings`: refused, as the models that are served here generate text."""

from typing import Annotated, Any, NoReturn

from fastapi import APIRouter, Body

from infuse.server.errors import ApiError
from infuse.server.openapi import errors

router = APIRouter(tags=["models"])


@router.post("/v1/embeddings", summary="Embed texts", response_model=None, responses=errors(400))
async def embed(
    _: Annotated[
        dict[str, Any], Body(description="OpenAI's request.", examples=[{"input": "A text"}])
    ],
) -> NoReturn:
    """Always refused: a model that generates text was not trained to give vectors of texts."""
    raise ApiError(
        400,
        "No embeddings are served here: the base model generates text, and what it computes of a "
        "text was not trained to be compared. Ask a server of an embedding model for them; "
        "/v1/rank compares texts by their likelihood.",
        code="not_served",
        param="model",
    )
