"""Answers routes of other servers that have no like here, with the way that does the same."""

from collections.abc import Mapping

from fastapi import APIRouter, Request

from infuse.server.auth import LORA_ROUTES
from infuse.server.errors import ApiError

_UPLOAD = (
    "adapters come by PUT /v1/adapters/{name} or POST /v1/adapters, with files or a source, and "
    "stay until DELETE /v1/adapters/{name}; requests name one as their 'model'"
)
_NO_EMBEDDINGS = "this server generates text"
NOT_SERVED: Mapping[tuple[str, str], str] = {
    # vLLM's and SGLang's.
    **{("POST", path): _UPLOAD for path in LORA_ROUTES},
    # Ollama's.
    ("POST", "/api/pull"): _UPLOAD,
    ("POST", "/api/push"): "GET /v1/adapters/{name}/files/{file} gives an adapter's files",
    ("POST", "/api/create"): f"{_UPLOAD}; POST /v1/adapters/combine makes one of others",
    ("POST", "/api/blobs/{digest}"): _UPLOAD,
    ("DELETE", "/api/delete"): "DELETE /v1/adapters/{name} deletes an adapter",
    ("POST", "/api/copy"): "POST /v1/adapters/combine with one adapter of weight 1 copies it",
    ("POST", "/api/embed"): _NO_EMBEDDINGS,
    ("POST", "/api/embeddings"): _NO_EMBEDDINGS,
}
"""Method and path -> what does the same here."""

router = APIRouter()


async def refuse(request: Request) -> None:
    """Refuse before a body is read. Raises ApiError 400."""
    method, path = request.method, request.scope["route"].path
    asked = f"{method} {path}"
    raise ApiError(
        400, f"{asked} is not served here: {NOT_SERVED[method, path]}.", code="not_served"
    )


for _method, _path in NOT_SERVED:
    router.add_api_route(_path, refuse, methods=[_method], include_in_schema=False)
