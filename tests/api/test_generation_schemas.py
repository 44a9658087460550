"""The generation endpoints in the OpenAPI document."""

import pytest
from pydantic import BaseModel

from infuse.server.api import (
    answer_schemas,
    chat_schemas,
    completion_schemas,
    model_schemas,
    models,
    response_output_schemas,
    response_schemas,
    schemas,
)
from infuse.server.api.constraint_schemas import StructuredOutputs


def _models() -> list[type[BaseModel]]:
    modules = (
        schemas,
        model_schemas,
        answer_schemas,
        completion_schemas,
        chat_schemas,
        models,
        response_schemas,
        response_output_schemas,
    )
    values = [value for module in modules for value in vars(module).values()]
    found = {value for value in values if isinstance(value, type) and issubclass(value, BaseModel)}
    return sorted(found - {BaseModel}, key=lambda model: model.__name__)


@pytest.mark.parametrize("model", _models(), ids=lambda model: model.__name__)
def test_every_field_is_described_with_an_example_that_fits(model: type[BaseModel]) -> None:
    example = {}
    for name, field in model.model_fields.items():
        assert field.description, name
        assert field.examples, name
        example[field.alias or name] = field.examples[0]
    if "stream_options" in example:
        example["stream"] = True
    if "add_generation_prompt" in example:
        example["continue_final_message"] = False

    if model is StructuredOutputs:
        for name, value in example.items():
            model.model_validate({name: value})
        return
    if "response_format" in example:
        # Each excludes the others.
        for name in ("structured_outputs", "tools", "tool_choice", "parallel_tool_calls"):
            example.pop(name, None)
    model.model_validate(example)


def test_requests_are_shown_as_clients_write_them() -> None:
    page = completion_schemas.CompletionBody.model_json_schema()["properties"]

    kinds = {kind["type"] for kind in page["prompt"]["anyOf"]}
    assert kinds == {"string", "array"}
    assert {kind["type"] for kind in page["stop"]["anyOf"]} == {"string", "array", "null"}
