"""The fields of a body that say what a request runs on."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_MIXED_ADAPTERS = 16
MAX_WEIGHT = 16.0
INT32 = 2**31


class AdapterWeight(BaseModel):
    """One adapter of a mixture."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        max_length=256,
        description="An adapter's name, or `name@revision`.",
        examples=["support-intent"],
    )
    weight: float = Field(
        1.0,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="How much of it: 0 is none, 1 all of it.",
        examples=[0.7],
    )


class ModelBody(BaseModel):
    """What a request runs on: the base model, an adapter, or a mixture of adapters."""

    model_config = ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )

    model: str = Field(
        min_length=1,
        max_length=1024,
        description="The base model's name, an adapter's name, or `name@revision`.",
        examples=["support-intent"],
    )
    strength: float | None = Field(
        None,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="How much of the adapter that `model` names: 0 is the base, 1 (the default) "
        "the adapter, 2 twice what it changes.",
        examples=[0.5],
    )
    adapters: list[AdapterWeight] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MIXED_ADAPTERS,
        description="Mix several adapters for this request; `model` is the base then.",
        examples=[[{"name": "support-intent", "weight": 0.7}, {"name": "sentiment"}]],
    )
    composition: Literal["product", "linear"] | None = Field(
        None,
        description="How `adapters` are mixed. `product` (the default): the factors "
        "1 + weight * (l - 1) multiply, as in PEFT's `set_adapter` with several. `linear`: the "
        "weighted sum of the vectors, as in PEFT's `add_weighted_adapter`.",
        examples=["product"],
    )
    priority: int | None = Field(
        None,
        ge=-INT32,
        lt=INT32,
        description="Of the requests of one key, those with a lower number leave the queue "
        "earlier (default 0); now and then one with a higher number is admitted first.",
        examples=[0],
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Only requests with the same salt share what was computed of their prompts.",
        examples=["tenant-7f3a"],
    )

    @property
    def choices_per_prompt(self) -> int:
        return 1

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer's length, and its value."""
        return "max_tokens", None
