"""The bodies and answers of the merges API."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from infuse.adapters.registry import Composition, Part
from infuse.server.api.adapter_schemas import MAX_COMBINED, AdminBody
from infuse.server.api.model_schemas import MAX_WEIGHT, AdapterWeight
from infuse.server.jobs import StoredMerge


class MergeBody(AdminBody):
    """One adapter, or several with their weights."""

    adapter: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="One adapter: `name`, or `name@revision`.",
        examples=["support-de@3"],
    )
    strength: float | None = Field(
        None,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="How much of that one: 0 is none, 1 (the default) all of it.",
        examples=[0.5],
    )
    adapters: list[AdapterWeight] | None = Field(
        None,
        min_length=1,
        max_length=MAX_COMBINED,
        description="Or several.",
        examples=[[{"name": "support-de", "weight": 0.5}, {"name": "support-fr@2", "weight": 0.5}]],
    )
    composition: Composition | None = Field(
        None,
        description="How several are mixed, as in a request: `product` (the default) or `linear`.",
        examples=["product"],
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if (self.adapter is None) == (self.adapters is None):
            raise ValueError("send either adapter or adapters")
        if self.adapters is None and self.composition is not None:
            raise ValueError("composition is for adapters: it says how several are mixed")
        if self.adapters is not None and self.strength is not None:
            raise ValueError("strength is for one adapter; give each of several its weight")
        return self

    @property
    def parts(self) -> list[Part]:
        if self.adapters is not None:
            return [Part(each.name, each.weight) for each in self.adapters]
        assert self.adapter is not None
        return [Part(self.adapter, 1.0 if self.strength is None else self.strength)]


class Merge(BaseModel):
    """A job that folds adapters into a copy of the base model."""

    object: Literal["merge"] = Field("merge", description="Kind.", examples=["merge"])
    id: str = Field(description="Its name.", examples=["merge-20261124061500123456-9f3a"])
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"] = Field(
        description="How far it is.", examples=["running"]
    )
    progress: float = Field(description="The share that is done, 0 to 1.", examples=[0.25])
    base: str = Field(description="The base model.", examples=["smollm2-135m-instruct"])
    recipe: Mapping[str, Any] = Field(
        description="What is merged: the revisions that the names meant when it was asked for.",
        examples=[
            {
                "method": "product",
                "adapters": [{"name": "support-de@3", "digest": "9f86d0818...", "weight": 1.0}],
            }
        ],
    )
    created: datetime = Field(
        description="When it was asked for.", examples=["2026-11-24T06:15:00Z"]
    )
    finished: datetime | None = Field(
        None, description="When it ended.", examples=["2026-11-24T06:16:00Z"]
    )
    by: str | None = Field(description="The key that asked for it.", examples=["ops"])
    size: int | None = Field(
        None, description="Bytes of the merged model, once it is there.", examples=[538100000]
    )
    error: str | None = Field(
        None, description="Why it failed.", examples=["the merged weight of lm_head is not finite"]
    )

    @classmethod
    def of(cls, job: StoredMerge) -> Self:
        return cls.model_validate(job, from_attributes=True)


class MergeList(BaseModel):
    object: Literal["list"] = Field("list", description="Kind.", examples=["list"])
    data: list[Merge] = Field(description="Oldest first.", examples=[[]])
    next: str | None = Field(
        description="Give this as `after` for the next page.",
        examples=["merge-20261124061500123456-9f3a"],
    )
