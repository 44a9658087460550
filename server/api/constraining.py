"""From a request's body to the grammar of its answer. Blocking: call it in a thread."""

import json
from typing import Any

from server.api.chat_schemas import ChatBody
from server.api.constraint_schemas import ResponseFormat, StructuredOutputs
from server.api.tool_formats import CallFormat, json_rule, parameters_of
from server.engine.constraints import Grammar
from server.engine.engine import Engine
from server.errors import ApiError


def structured_grammar(engine: Engine, asked: StructuredOutputs | None) -> Grammar | None:
    """The grammar of `structured_outputs`, if any. Raises BadConstraint."""
    compile = engine.grammars.compile
    match asked:
        case None:
            return None
        case StructuredOutputs(json_=schema) if schema is not None:
            where = "structured_outputs.json"
            return compile("json", _parsed(schema, where), where)
        case StructuredOutputs(regex=str(regex)):
            return compile("regex", regex, "structured_outputs.regex")
        case StructuredOutputs(choice=list(alternatives)):
            return compile("choice", alternatives, "structured_outputs.choice")
        case _:
            return compile("grammar", asked.grammar, "structured_outputs.grammar")


def _parsed(schema: dict[str, Any] | str, where: str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{where} is no JSON: {error}", param=where) from error


def chat_grammar(engine: Engine, body: ChatBody, calls: CallFormat | None) -> Grammar | None:
    """The grammar of a chat's answer, if any. Raises BadConstraint, and ApiError 400."""
    schema = _schema_of(body.response_format)
    if body.structured_outputs is not None:
        if schema is not None or body.offered_tools:
            other = "tools" if schema is None else "response_format"
            raise ApiError(
                400,
                f"structured_outputs and {other} exclude each other; leave one out.",
                param="structured_outputs",
            )
        return structured_grammar(engine, body.structured_outputs)
    if body.tools_to_call:
        return _calls_grammar(engine, body, calls)
    if schema is None:
        return None
    grammar = engine.grammars.compile("json", schema, "response_format.json_schema.schema")
    if not body.offered_tools:
        return grammar
    rules = _writable(calls).rules(body.offered_tools, body.calls_several)
    either = f"start: calls | answer\nanswer: {json_rule(schema)}\n{rules}"
    return engine.grammars.compile("grammar", either, "tools")


def _calls_grammar(engine: Engine, body: ChatBody, calls: CallFormat | None) -> Grammar:
    tools = body.tools_to_call
    for index, tool in enumerate(body.offered_tools):
        if tool in tools:
            where = f"tools[{index}].function.parameters"
            engine.grammars.compile("json", parameters_of(tool), where)
    rules = _writable(calls).rules(tools, body.calls_several)
    return engine.grammars.compile("grammar", f"start: calls\n{rules}", "tools")


def _schema_of(asked: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema of `response_format`; None where any text will do."""
    if asked is None or asked.type == "text":
        return None
    return {"type": "object"} if asked.json_schema is None else asked.json_schema.schema_


def _writable(calls: CallFormat | None) -> CallFormat:
    if calls is None or not calls.writes:
        raise ApiError(
            400,
            "How this model writes its calls is not known, so it cannot be held to them; leave "
            'tool_choice at "auto", without a response_format.',
            param="tool_choice",
        )
    return calls
