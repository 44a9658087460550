"""The models in the form of Anthropic's API, in which its clients get `/v1/models`."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import Header
from pydantic import BaseModel, Field

AnthropicVersion = Annotated[
    str | None,
    Header(
        alias="anthropic-version",
        description="Anthropic's clients send it: the answer has Anthropic's form.",
        examples=["2023-06-01"],
    ),
]


class AnthropicModel(BaseModel):
    """Something that a generation request can name as its `model`."""

    type: Literal["model"] = Field("model", description="Always `model`.", examples=["model"])
    id: str = Field(description="The name to ask for.", examples=["support-intent"])
    display_name: str = Field(description="The same.", examples=["support-intent"])
    created_at: datetime = Field(
        description="When the adapter's revision was made, or the server started.",
        examples=["2026-11-30T12:00:00Z"],
    )
    lifecycle: Literal["active"] = Field(
        "active", description="Always `active`.", examples=["active"]
    )
    max_input_tokens: int = Field(
        description="Tokens that a prompt and its answer have at most.", examples=[8192]
    )
    max_tokens: int = Field(
        description="Tokens that an answer has at most, after the shortest prompt.",
        examples=[8191],
    )


class AnthropicModels(BaseModel):
    """Everything that is served, or a page of it."""

    data: list[AnthropicModel] = Field(
        description="The base model, then the adapters by name.",
        examples=[
            [
                {
                    "type": "model",
                    "id": "smollm2-135m-instruct",
                    "display_name": "smollm2-135m-instruct",
                    "created_at": "2026-11-30T12:00:00Z",
                    "lifecycle": "active",
                    "max_input_tokens": 8192,
                    "max_tokens": 8191,
                }
            ]
        ],
    )
    has_more: bool = Field(
        description="Whether a `limit` left some out: give `last_id` as `after_id` for the next "
        "page.",
        examples=[False],
    )
    first_id: str | None = Field(
        description="The first id of `data`.", examples=["smollm2-135m-instruct"]
    )
    last_id: str | None = Field(description="The last one.", examples=["support-intent"])
