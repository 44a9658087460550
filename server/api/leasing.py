"""Leases what a generation request runs on: the base, an adapter, or a mixture of adapters."""

from collections.abc import Iterator
from contextlib import contextmanager

from infuse.adapters.errors import UnknownAdapter, UnknownRevision
from infuse.adapters.registry import Part
from infuse.adapters.residency import Lease
from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.model_schemas import ModelBody
from infuse.server.caller import Caller
from infuse.server.errors import ApiError
from infuse.server.services import Services


def unknown_model(model: str) -> ApiError:
    return ApiError(
        404,
        f"There is no model '{model[:200]}'; GET /v1/models lists the base model and every "
        "adapter.",
        code="model_not_found",
        param="model",
    )


@contextmanager
def leased(
    services: Services, body: ModelBody, caller: Caller
) -> Iterator[tuple[Lease | None, Vocabulary]]:
    """Within: a lease on what the request names (None for the base), and how its texts are read.

    Blocking: the registry may read from disk. Raises ApiError 400, 403, 404; AdapterDisabled.
    """
    base = Vocabulary(services.engine.model.tokenizer, services.engine.model.vocab_size)
    _check_mixture(services, body)
    if body.model == services.model_name and body.adapters is None:
        yield None, base
        return
    with _lease(services, body, caller) as lease:
        yield lease, lease.vocabulary or base


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


def _lease(services: Services, body: ModelBody, caller: Caller) -> Lease:
    if body.adapters is not None:
        parts = [Part(part.name, part.weight) for part in body.adapters]
    elif body.strength is not None:
        parts = [Part(body.model, body.strength)]
    else:
        parts = []
    with _unknown_models():
        for name in [part.name for part in parts] or [body.model]:
            caller.check_uses(name)
        if parts:
            return services.registry.lease_mixture(parts, body.composition or "product")
        return services.registry.lease(body.model)


@contextmanager
def _unknown_models() -> Iterator[None]:
    """Report an unknown adapter or revision as an unknown model."""
    try:
        yield
    except UnknownAdapter as error:
        raise unknown_model(error.name) from None
    except UnknownRevision as error:
        raise unknown_model(f"{error.name}@{error.revision}") from None
