"""What a generation request runs on: the base, an adapter, or a mixture of adapters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from adapters.errors import UnknownAdapter, UnknownRevision
from adapters.registry import Part
from adapters.residency import Lease
from server.api.schemas import ModelBody
from server.errors import ApiError
from server.services import Services


def unknown_model(model: str) -> ApiError:
    return ApiError(
        404,
        f"There is no model '{model[:200]}'; GET /v1/models lists the base model and every "
        "adapter.",
        code="model_not_found",
        param="model",
    )


def check_model(services: Services, body: ModelBody) -> None:
    """Refuse what cannot be leased before the prompt is read. The lease alone reads the disk.

    Raises ApiError 400, 404; AdapterDisabled.
    """
    _check_mixture(services, body)
    with _unknown_models():
        if body.adapters is not None:
            for part in body.adapters:
                services.registry.resolve(part.name)
        elif body.model != services.model_name:
            services.registry.resolve(body.model)


def lease_choices(
    services: Services, body: ModelBody, count: int, undo: ExitStack
) -> list[Lease | None]:
    """A lease for each choice, all on the same revisions; None for the base. Blocking: the
    registry may read from disk. Raises ApiError 400, 404; AdapterDisabled."""
    _check_mixture(services, body)
    if body.model == services.model_name and body.adapters is None:
        return [None] * count
    first = undo.enter_context(_lease(services, body))
    return [first, *(undo.enter_context(first.again()) for _ in range(count - 1))]


def _check_mixture(services: Services, body: ModelBody) -> None:
    is_base = body.model == services.model_name
    if body.adapters is None:
        if body.composition is not None:
            raise ApiError(400, "composition says how adapters are mixed.", param="composition")
        if body.strength is not None and is_base:
            raise ApiError(400, "The base model has no strength.", param="strength")
        return
    if not is_base:
        problem = f"adapters are mixed on the base: set model to '{services.model_name}'."
        raise ApiError(400, problem, param="model")
    if body.strength is not None:
        problem = "strength is for one adapter; give each of several its weight."
        raise ApiError(400, problem, param="strength")


def _lease(services: Services, body: ModelBody) -> Lease:
    if body.adapters is not None:
        parts = [Part(part.name, part.weight) for part in body.adapters]
    elif body.strength is not None:
        parts = [Part(body.model, body.strength)]
    else:
        parts = []
    with _unknown_models():
        if parts:
            return services.registry.lease_mixture(parts, body.composition or "product")
        return services.registry.lease(body.model)


@contextmanager
def _unknown_models() -> Iterator[None]:
    """What names no adapter of ours names no model."""
    try:
        yield
    except UnknownAdapter as error:
        raise unknown_model(error.name) from None
    except UnknownRevision as error:
        raise unknown_model(f"{error.name}@{error.revision}") from None
