"""`GET /v1/models`: the base model and every adapter."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field

from infuse.adapters.errors import InvalidAdapter, UnknownAdapter, UnknownRevision
from infuse.adapters.storage.revision import Revision
from infuse.server.api.anthropic_models import AnthropicModel, AnthropicModels, AnthropicVersion
from infuse.server.api.leasing import unknown_model
from infuse.server.auth import CallerDep
from infuse.server.caller import Caller
from infuse.server.errors import ApiError
from infuse.server.openapi import errors
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["models"])


class Model(BaseModel):
    """Something that a generation request can name as its `model`."""

    id: str = Field(description="The name to ask for.", examples=["support-intent"])
    object: Literal["model"] = Field("model", description="Always `model`.", examples=["model"])
    created: int = Field(
        description="Unix time in seconds: when the adapter's revision was made, or the server "
        "started.",
        examples=[1764000000],
    )
    owned_by: str = Field("infuse", description="Always `infuse`.", examples=["infuse"])
    root: str = Field(
        description="What answers: the adapter with its revision, or the base model.",
        examples=["support-intent@3"],
    )
    parent: str | None = Field(
        description="The base model of an adapter; null for the base model itself.",
        examples=["smollm2-135m-instruct"],
    )
    max_model_len: int = Field(
        description="Tokens that a prompt and its answer have at most.", examples=[8192]
    )


class ModelList(BaseModel):
    """Everything that is served, or a page of it."""

    object: Literal["list"] = Field("list", description="Always `list`.", examples=["list"])
    data: list[Model] = Field(
        description="The base model, then the adapters by name.",
        examples=[
            [
                {
                    "id": "smollm2-135m-instruct",
                    "object": "model",
                    "created": 1764000000,
                    "owned_by": "infuse",
                    "root": "smollm2-135m-instruct",
                    "parent": None,
                    "max_model_len": 8192,
                }
            ]
        ],
    )
    next: str | None = Field(
        None,
        description="Where a `limit` left some out: give this as `after` for the next page.",
        examples=[None],
    )


@router.get("/v1/models", summary="List the models")
@router.get("/v1/models/", include_in_schema=False)
def list_models(
    services: ServicesDep,
    caller: CallerDep,
    limit: Annotated[
        int | None, Query(ge=1, le=1000, description="Page size; default: all.", examples=[100])
    ] = None,
    after: Annotated[
        str | None, Query(description="The last id of the page before.", examples=["a"])
    ] = None,
    after_id: Annotated[
        str | None, Query(description="The same, by Anthropic's name.", examples=["a"])
    ] = None,
    before_id: Annotated[str | None, Query(include_in_schema=False)] = None,
    version: AnthropicVersion = None,
) -> ModelList | AnthropicModels:
    """The base model and the current revision of every adapter that the key may see."""
    if before_id is not None:
        message = "Pages go forward only: ask for the next one by after_id, not by before_id."
        raise ApiError(400, message, param="before_id")
    page = _page(services, caller, limit, after_id if after is None else after)
    return page if version is None else _anthropics_page(services, page)


def _page(services: Services, caller: Caller, limit: int | None, after: str | None) -> ModelList:
    # The base stands first, whatever its name.
    begins = after is None or after == services.model_name
    first = [_base(services)] if after is None else []
    room = None if limit is None else limit - len(first)
    names = caller.visible(
        services.registry.stored, None if begins else after, None if room is None else room + 1
    )
    more = room is not None and len(names) > room
    page = [*first, *_adapters(services, names if room is None else names[:room])]
    last = names[room - 1] if more and room else services.model_name
    return ModelList(data=page, next=last if more else None)


@router.get(
    "/v1/models/{model:path}",
    summary="Look a model up",
    responses=errors(404),
)
async def get_model(
    model: Annotated[str, Path(description="What to look up.", examples=["support-intent@3"])],
    services: ServicesDep,
    caller: CallerDep,
    version: AnthropicVersion = None,
) -> Model | AnthropicModel:
    """The base model, an adapter, or one revision of an adapter (`name@revision`)."""
    # Not on a thread: it reads memory alone, and requests that hang may hold all threads.
    found = _find(services, caller, model)
    return found if version is None else _anthropics(services, found)


def _find(services: Services, caller: Caller, model: str) -> Model:
    if model == services.model_name:
        return _base(services)
    stored = services.registry.stored
    name, at, number = model.partition("@")
    try:
        caller.check_sees(name)
        if not at:
            return _adapter(services, name, stored.current(name))
        if not (number.isascii() and number.isdigit() and len(number) < 10):
            raise unknown_model(model)
        return _adapter(services, model, stored.revision(name, int(number)))
    except (UnknownAdapter, UnknownRevision, InvalidAdapter):
        raise unknown_model(model) from None


def _base(services: Services) -> Model:
    return Model(
        id=services.model_name,
        created=_seconds(services.started),
        root=services.model_name,
        parent=None,
        max_model_len=services.engine.model.max_model_len,
    )


def _adapters(services: Services, names: Iterable[str]) -> Iterator[Model]:
    for name in names:
        # It may have been deleted since the names were read.
        with suppress(UnknownAdapter):
            yield _adapter(services, name, services.registry.stored.current(name))


def _adapter(services: Services, model: str, revision: Revision) -> Model:
    return Model(
        id=model,
        created=_seconds(revision.created),
        root=f"{revision.name}@{revision.number}",
        parent=services.model_name,
        max_model_len=services.engine.model.max_model_len,
    )


def _anthropics_page(services: Services, page: ModelList) -> AnthropicModels:
    data = [_anthropics(services, each) for each in page.data]
    return AnthropicModels(
        data=data,
        has_more=page.next is not None,
        first_id=data[0].id if data else None,
        last_id=page.next or (data[-1].id if data else None),
    )


def _anthropics(services: Services, model: Model) -> AnthropicModel:
    return AnthropicModel(
        id=model.id,
        display_name=model.id,
        created_at=datetime.fromtimestamp(model.created, UTC),
        max_input_tokens=model.max_model_len,
        max_tokens=services.engine.model.room_after(1),
    )


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
