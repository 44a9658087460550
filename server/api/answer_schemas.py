"""The fields that answers of completions and chat completions share."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class CompletionTokensDetails(BaseModel):
    """What became of a prediction."""

    accepted_prediction_tokens: int = Field(
        description="Tokens of the answers that the prediction foretold.", examples=[25]
    )
    rejected_prediction_tokens: int = Field(
        description="The prediction's other tokens, for each answer.", examples=[3]
    )


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.", examples=[0])


USAGE_EXAMPLE = {
    "prompt_tokens": 12,
    "completion_tokens": 30,
    "total_tokens": 42,
    "prompt_tokens_details": {"cached_tokens": 0},
}


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int = Field(
        description="Tokens of all prompts; a prompt with several choices counts once.",
        examples=[12],
    )
    completion_tokens: int = Field(
        description="Generated tokens of all choices, end tokens included.", examples=[30]
    )
    total_tokens: int = Field(description="Both together.", examples=[42])
    prompt_tokens_details: PromptTokensDetails = Field(
        description="What the prompt tokens are made of.", examples=[{"cached_tokens": 0}]
    )
    completion_tokens_details: CompletionTokensDetails | None = Field(
        None, description="Set where the request had a prediction.", examples=[None]
    )

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> "Usage":
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


FinishedBecause = Literal["stop", "length"]
StopReason = str | int | None
STOP_REASON: Any = Field(
    None,
    description="vLLM's: the stop string or the one of `stop_token_ids` that ended the text; null "
    "where an end token or the token limit did. In a stream only where the choice ends.",
    examples=["\n\n"],
)
