"""Constraints on an answer: OpenAI's `response_format` and vLLM's `structured_outputs`."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from infuse.server.engine.constraints.vetting import GrammarKind

MAX_ALTERNATIVES = 4096

Alternative = Annotated[str, Field(min_length=1)]
Alternatives = Annotated[list[Alternative], Field(min_length=1, max_length=MAX_ALTERNATIVES)]

ANY_OBJECT: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must match, and the field that says so."""

    kind: GrammarKind
    source: object
    where: str

    @property
    def field(self) -> str:
        """The field of the body that it stands in."""
        return self.where.partition(".")[0]


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

    type: Literal["text", "json_object", "json_schema", "json"] = Field(
        description="`text` is anything, `json_object` any JSON object, `json_schema` JSON that "
        "validates. `json_object` may have a `schema`; Hugging Face's `json` has it as `value`.",
        examples=["json_schema"],
    )
    json_schema: JsonSchema | None = Field(
        None,
        description="With the type `json_schema`.",
        examples=[{"name": "city", "schema": {"type": "object"}}],
    )
    schema_: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="A JSON schema, with the types `json_object` and `json`: llama.cpp's form.",
        examples=[None],
    )
    value: dict[str, Any] | None = Field(
        None,
        description="The same as `schema`: Hugging Face's form.",
        examples=[None],
    )

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema comes with the type json_schema, and only with it")
        given = [name for name in ("schema", "value") if getattr(self, _ATTRIBUTES[name])]
        if given and self.type not in ("json_object", "json"):
            raise ValueError(f"{given[0]} comes with the types json_object and json only")
        if len(given) == 2:
            raise ValueError("schema and value say the same; leave one out")
        return self

    @property
    def constraints(self) -> list[Constraint]:
        """The constraint that the format is, or none for plain text."""
        where = "response_format"
        match self:
            case ResponseFormat(type="text"):
                return []
            case ResponseFormat(json_schema=JsonSchema(schema_=schema)):
                return [Constraint("json", schema, f"{where}.json_schema.schema")]
            case ResponseFormat(schema_=dict(schema)) if schema:
                return [Constraint("json", schema, f"{where}.schema")]
            case ResponseFormat(value=dict(schema)) if schema:
                return [Constraint("json", schema, f"{where}.value")]
            case _:
                return [Constraint("json", ANY_OBJECT, where)]


_ATTRIBUTES = {"schema": "schema_", "value": "value"}


def _without_what_asks_nothing(given: object) -> object:
    """Drop unset fields: clients that write all of vLLM's fields write some as null or false."""
    if not isinstance(given, dict):
        return given
    unset = ("structural_tag", "whitespace_pattern", *_SWITCHES)
    return {k: v for k, v in given.items() if k not in unset or v not in (None, False)}


_SWITCHES = ("disable_any_whitespace", "disable_additional_properties", "disable_fallback")


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
    choice: Alternatives | None = Field(
        None,
        description="The answer is one of these.",
        examples=[["positive", "negative"]],
    )
    grammar: str | None = Field(
        None,
        description="A context-free grammar, in Lark's or in GBNF's syntax.",
        examples=['start: "yes" | "no"'],
    )
    json_object: bool | None = Field(
        None, description="Any JSON object, where true.", examples=[True]
    )

    @model_validator(mode="before")
    @classmethod
    def _asks_for_what_is_served(cls, given: object) -> object:
        return _without_what_asks_nothing(given)

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.constraints()) != 1:
            raise ValueError("takes exactly one of json, regex, choice, grammar and json_object")
        return self

    def constraints(self, prefix: str = "structured_outputs.") -> list[Constraint]:
        """The constraints that are given, each named by `prefix` and its field."""
        given: dict[GrammarKind, object] = {
            "json": self.json_,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        found = [Constraint(k, v, f"{prefix}{k}") for k, v in given.items() if v is not None]
        if self.json_object:
            found.append(Constraint("json", ANY_OBJECT, f"{prefix}json_object"))
        return found
