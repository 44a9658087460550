"""Compiles the grammar that a request's answer must match. Blocking: call it on a thread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from infuse.server.api.chat_schemas import ChatBody
from infuse.server.api.constraint_schemas import Constraint
from infuse.server.api.tool_formats import CallFormat, json_rule, parameters_of
from infuse.server.engine.constraints.grammars import Grammar, Grammars
from infuse.server.engine.errors import BadConstraint, ConstraintsUnavailable
from infuse.server.errors import ApiError


@dataclass(frozen=True, slots=True)
class Held:
    """The grammar that an answer must match, and where in the answer it begins."""

    grammar: Grammar | None = None
    begin: "regex.Pattern[str] | None" = None
    """The grammar begins behind the first match of this pattern; None: at the answer's start."""


FREE = Held()


def answer_grammar(grammars: Grammars, constraints: Sequence[Constraint]) -> Grammar | None:
    """The grammar of an answer, if it must match one. Raises BadConstraint, and ApiError 400 where
    several fields ask for one."""
    if not constraints:
        return None
    _refuse_two([constraint.field for constraint in constraints])
    [asked] = constraints
    source = _parsed(asked) if asked.kind == "json" else asked.source
    return grammars.compile(asked.kind, source, asked.where)


def _parsed(asked: Constraint) -> Any:
    """A JSON schema that may have come as text."""
    if not isinstance(asked.source, str):
        return asked.source
    try:
        return json.loads(asked.source)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{asked.where} is no JSON: {error}", param=asked.where) from error


def _refuse_two(fields: Sequence[str]) -> None:
    if len(fields) > 1:
        one, other = fields[-1], fields[0]
        raise ApiError(400, f"{one} and {other} exclude each other; leave one out.", param=one)


def chat_grammar(grammars: Grammars, body: ChatBody, calls: CallFormat | None) -> Held:
    """The grammar of a chat's answer, if it must match one. Raises BadConstraint, ApiError 400."""
    formats = body.format_constraints
    others = [each.field for each in body.constraints if each not in formats]
    if others and body.offered_tools:
        _refuse_two(["tools", *others])
    if body.tools_to_call:
        return Held(_calls_grammar(grammars, body, calls))
    if not body.offered_tools:
        return Held(answer_grammar(grammars, body.constraints))
    if formats:
        [format] = formats
        answer_grammar(grammars, formats)
        assert isinstance(format.source, dict)
        rules = _writable(calls).rules(body.offered_tools, body.calls_several)
        either = f"start: calls | answer\nanswer: {json_rule(format.source)}\n{rules}"
        return Held(grammars.compile("grammar", either, "tools"))
    return _begun_calls(grammars, body, calls)


def _calls_grammar(grammars: Grammars, body: ChatBody, calls: CallFormat | None) -> Grammar:
    for index, tool in enumerate(body.offered_tools):
        if tool in body.tools_to_call:
            grammars.compile("json", parameters_of(tool), body.place_of_parameters(index))
    rules = _writable(calls).rules(body.tools_to_call, body.calls_several)
    return grammars.compile("grammar", f"start: calls\n{rules}", "tools")


def _begun_calls(grammars: Grammars, body: ChatBody, calls: CallFormat | None) -> Held:
    """The model decides whether it calls a tool; a call that has begun must match the schemas."""
    if calls is None or not calls.writes:
        return FREE
    tools = body.offered_tools

    def compiled(schemas: Mapping[str, Any]) -> Grammar:
        rules = calls.rules(tools, body.calls_several, begun=True, schemas=schemas)
        return grammars.compile("grammar", f"start: calls\n{rules}", "tools")

    try:
        grammar = compiled({tool.function.name: parameters_of(tool) for tool in tools})
    except ConstraintsUnavailable:
        return FREE
    except BadConstraint:
        schemas = _schemas_that_hold(grammars, body)
        try:
            grammar = compiled(schemas)
        except BadConstraint:
            # Each schema compiles, and all together are too large: calls are not constrained.
            return FREE
    return Held(grammar, calls.beginning_of(tools))


def _schemas_that_hold(grammars: Grammars, body: ChatBody) -> dict[str, Any]:
    """Each function's schema; any object for a schema that cannot be compiled and is not strict.

    Raises BadConstraint for a strict one.
    """
    schemas: dict[str, Any] = {}
    for index, tool in enumerate(body.offered_tools):
        schema = parameters_of(tool)
        try:
            grammars.compile("json", schema, body.place_of_parameters(index))
        except BadConstraint:
            if tool.function.strict:
                raise
            schema = {"type": "object"}
        schemas[tool.function.name] = schema
    return schemas


def _writable(calls: CallFormat | None) -> CallFormat:
    if calls is None or not calls.writes:
        raise ApiError(
            400,
            "How this model writes its calls is not known, so it cannot be held to them; leave "
            'tool_choice at "auto", without a format.',
            param="tool_choice",
        )
    return calls
