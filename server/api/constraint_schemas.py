"""What an answer must look like: OpenAI's `response_format`, and vLLM's `structured_outputs`."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_ALTERNATIVES = 4096

Alternative = Annotated[str, Field(min_length=1)]


class JsonSchema(BaseModel):
    """A named JSON schema."""

    model_config = ConfigDict(strict=True)

    name: str = Field(
        min_length=1, max_length=256, description="For people; has no effect.", examples=["order"]
    )
    schema_: dict[str, Any] = Field(
        alias="schema",
        description="What the answer must validate against. A keyword that cannot be held is "
        "refused.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Taken for compatibility: every answer matches its schema.",
        examples=[True],
    )


class ResponseFormat(BaseModel):
    """The form of an answer."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text` is anything, `json_object` any JSON object, `json_schema` JSON that "
        "validates.",
        examples=["json_schema"],
    )
    json_schema: JsonSchema | None = Field(
        None,
        description="With the type `json_schema`.",
        examples=[{"name": "city", "schema": {"type": "object"}}],
    )

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with the type json_schema, and only with it")
        return self


class StructuredOutputs(BaseModel):
    """One of these constraints."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | str | None = Field(
        None,
        alias="json",
        description="A JSON schema, or its text.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    regex: str | None = Field(
        None,
        description="A regular expression (Rust's syntax) that matches the whole answer.",
        examples=["[0-9]{4}-[0-9]{2}-[0-9]{2}"],
    )
    choice: list[Alternative] | None = Field(
        None,
        min_length=1,
        max_length=MAX_ALTERNATIVES,
        description="The answer is one of these.",
        examples=[["positive", "negative"]],
    )
    grammar: str | None = Field(
        None,
        description="A context-free grammar, in Lark's or in GBNF's syntax.",
        examples=['start: "yes" | "no"'],
    )

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [self.json_, self.regex, self.choice, self.grammar]
        if sum(each is not None for each in given) != 1:
            raise ValueError("takes exactly one of json, regex, choice and grammar")
        return self
