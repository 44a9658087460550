"""Ollama's `/api/tags`, `/api/ps`, `/api/show` and `/api/version`: the models, as Ollama lists
them."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from infuse.adapters.errors import UnknownAdapter, UnknownRevision
from infuse.adapters.storage.revision import Revision
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.leasing import leased
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.preparing import prepared
from infuse.server.api.tool_formats import find_format
from infuse.server.auth import CallerDep
from infuse.server.openapi import READS, errors
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["models"])

OLLAMA = "0.12.11"
"""The version of Ollama whose API this is; clients ask for it before they use what is newer."""
_NEVER = "9999-12-31T23:59:59Z"
_DETAILS_EXAMPLE = {
    "parent_model": "smollm2-135m-instruct",
    "format": "safetensors",
    "family": "infuse",
    "families": ["infuse"],
    "parameter_size": "",
    "quantization_level": "",
}


class OllamaDetails(BaseModel):
    """What a model is."""

    parent_model: str = Field(
        description="The base model of an adapter; empty for the base itself.",
        examples=["smollm2-135m-instruct"],
    )
    format: str = Field(description="Always `safetensors`.", examples=["safetensors"])
    family: str = Field(description="Always `infuse`.", examples=["infuse"])
    families: list[str] = Field(description="The family alone.", examples=[["infuse"]])
    parameter_size: str = Field(description="Not told.", examples=[""])
    quantization_level: str = Field(description="Not told.", examples=[""])


class OllamaModel(BaseModel):
    """Something that a request can name as its `model`."""

    name: str = Field(description="The name to ask for.", examples=["support-intent"])
    model: str = Field(description="The same.", examples=["support-intent"])
    modified_at: datetime = Field(
        description="When the adapter's revision was made, or the server started.",
        examples=["2026-11-30T12:00:00Z"],
    )
    size: int = Field(description="Bytes of an adapter's files; 0 for the base.", examples=[2816])
    digest: str = Field(
        description="The SHA-256 of an adapter's files; empty for the base.", examples=["7f3a"]
    )
    details: OllamaDetails = Field(description="What it is.", examples=[_DETAILS_EXAMPLE])


class OllamaModels(BaseModel):
    """Everything that is served."""

    models: list[OllamaModel] = Field(
        description="The base model, then the adapters by name.", examples=[[]]
    )


class LoadedModel(OllamaModel):
    """A model on the device."""

    expires_at: str = Field(
        description="Never: an adapter leaves the device when others need its slot.",
        examples=[_NEVER],
    )
    size_vram: int = Field(description="The same as `size`.", examples=[2816])
    context_length: int = Field(
        description="Tokens that a prompt and its answer have at most.", examples=[8192]
    )


class LoadedModels(BaseModel):
    """What is on the device."""

    models: list[LoadedModel] = Field(
        description="The base model, then the adapters that have a slot.", examples=[[]]
    )


class ShowBody(BaseModel):
    """Which model to show."""

    model_config = ConfigDict(strict=True)

    model: str = Field(
        min_length=1,
        max_length=1024,
        description="The base model's name, an adapter's name, or `name@revision`.",
        examples=["support-intent"],
    )


class ShownModel(BaseModel):
    """What a model is."""

    modelfile: str = Field(
        description="What answers.", examples=["FROM smollm2-135m-instruct\nADAPTER support@3\n"]
    )
    parameters: str = Field(description="Always empty.", examples=[""])
    template: str = Field(
        description="Always empty: chat templates are not Ollama's.", examples=[""]
    )
    details: OllamaDetails = Field(description="What it is.", examples=[_DETAILS_EXAMPLE])
    model_info: dict[str, Any] = Field(
        description="Its context length.",
        examples=[{"general.architecture": "infuse", "infuse.context_length": 8192}],
    )
    capabilities: list[str] = Field(
        description="`completion`, and `tools` where its chat template has a place for them.",
        examples=[["completion", "tools"]],
    )


class Version(BaseModel):
    version: str = Field(description="The version of Ollama whose API this is.", examples=[OLLAMA])


@router.get("/api/tags", summary="List the models, as Ollama's API does")
def list_tags(services: ServicesDep, caller: CallerDep) -> OllamaModels:
    """The base model and the current revision of every adapter that the key may see."""
    stored = services.registry.stored

    def adapters() -> Iterator[OllamaModel]:
        for name in caller.visible(stored, None, None):
            # It may have been deleted since the names were read.
            with suppress(UnknownAdapter):
                yield OllamaModel(**_described(services, name, stored.current(name)))

    return OllamaModels(models=[OllamaModel(**_described(services)), *adapters()])


@router.get("/api/ps", summary="List the models on the device, as Ollama's API does")
def list_loaded(services: ServicesDep, caller: CallerDep) -> LoadedModels:
    """The base model, and the adapters that have a slot and that the key may see."""
    stored = services.registry.stored

    def adapters() -> Iterator[LoadedModel]:
        for use in services.registry.residency.slots():
            name, at, number = use.label.partition("@")
            # A mixture has a label of its own, and a revision may have been dropped.
            if at and number.isdigit() and caller.sees(name):
                with suppress(UnknownAdapter, UnknownRevision):
                    yield _loaded(services, use.label, stored.revision(name, int(number)))

    return LoadedModels(models=[_loaded(services), *adapters()])


@router.post(
    "/api/show",
    summary="Show a model, as Ollama's API does",
    responses=errors(404, 504, *READS, said={403: "The key may not do this."}),
)
async def show(
    body: ShowBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> ShownModel:
    """What a model is, and whether it can call tools."""

    def look() -> ShownModel:
        with leased(services, ModelBody(model=body.model), caller) as (lease, vocabulary):
            tokens = services.engine.model.tokenizer.get_added_vocab()
            calls = vocabulary.has_template and find_format(vocabulary, tokens) is not None
            adapter = "" if lease is None else f"ADAPTER {lease.label}\n"
            return ShownModel(
                modelfile=f"FROM {services.model_name}\n{adapter}",
                parameters="",
                template="",
                details=_details(services, is_adapter=lease is not None),
                model_info={
                    "general.architecture": "infuse",
                    "general.basename": services.model_name,
                    "infuse.context_length": services.engine.model.max_model_len,
                },
                capabilities=["completion", *(["tools"] if calls else [])],
            )

    return await prepared(request, services, caller, deadline, look)


@router.get("/api/version", summary="Tell the version, as Ollama's API does")
async def version() -> Version:
    """The version of Ollama whose API this is."""
    return Version(version=OLLAMA)


def _described(
    services: Services, name: str | None = None, revision: Revision | None = None
) -> dict[str, Any]:
    """The fields of an adapter, or of the base."""
    name = name or services.model_name
    return {
        "name": name,
        "model": name,
        "modified_at": services.started if revision is None else revision.created,
        "size": 0 if revision is None else revision.size,
        "digest": "" if revision is None else revision.digest,
        "details": _details(services, is_adapter=revision is not None),
    }


def _loaded(
    services: Services, name: str | None = None, revision: Revision | None = None
) -> LoadedModel:
    described = _described(services, name, revision)
    length = services.engine.model.max_model_len
    return LoadedModel(
        **described, expires_at=_NEVER, size_vram=described["size"], context_length=length
    )


def _details(services: Services, *, is_adapter: bool) -> OllamaDetails:
    return OllamaDetails(
        parent_model=services.model_name if is_adapter else "",
        format="safetensors",
        family="infuse",
        families=["infuse"],
        parameter_size="",
        quantization_level="",
    )
