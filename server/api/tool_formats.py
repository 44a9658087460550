"""Finds out how a model writes its tool calls, from its own chat template.

Calls are read by the tokenizer's own `response_template` where it has one. Otherwise the chat
template is asked to write a call, and the known format that looks so is taken.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import regex
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from infuse.adapters.errors import TemplateRefused
from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.tool_schemas import NO_PARAMETERS, Tool, new_call_id
from infuse.server.engine.constraints.vetting import JSON_OPTIONS, supported_schema

log = logging.getLogger(__name__)

_PROBE = {"name": "probe", "arguments": {"x": 1}}
_BLANKS = "BLANKS: /[ \\n]{1,2}/"
"""A model may write other blanks around its calls than its template does, but not without end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """`{"name": …, <arguments>: {…}}`, one or several, after a mark and between two brackets."""

    mark: str
    """The text that begins the calls; empty where the whole answer is one call."""
    opening: str = ""
    separator: str | None
    """The text between two calls; None where an answer has one call only."""
    closing: str
    end: str = ""
    """The text that ends the calls; empty where the answer's end does."""
    arguments: str
    begin: "regex.Pattern[str]"
    """Finds the mark, or the whole answer that is a call, in an answer's text."""
    writes: bool = True
    """False where only the reading is known, so that no grammar can be made."""
    response_template: ResponseTemplate | None = None
    """The tokenizer's own template for reading answers, where it has one."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Text -> token id of the format's parts that are single tokens."""

    @property
    def has_own_reading(self) -> bool:
        return self.response_template is not None

    @property
    def is_whole_answer(self) -> bool:
        return not self.mark

    def writes_like(self, written: str) -> bool:
        head = f'{{"name": "probe", "{self.arguments}": {{"x": 1}}'
        call = self.mark + self.opening + head
        return "".join(call.split()) in "".join(written.split())

    def beginning_of(self, tools: Sequence[Tool]) -> "regex.Pattern[str]":
        """Finds where a call of one of the tools has begun for certain: an answer that is JSON may
        have a name too."""
        if not self.is_whole_answer:
            return self.begin
        names = "|".join(regex.escape(tool.function.name) for tool in tools)
        head = rf'\{{\s*"name"\s*:\s*"(?:{names})"\s*,\s*"{self.arguments}"'
        return regex.compile(rf"\A\s*(?:<\|python_tag\|>)?\s*(?={head})")

    def rules(
        self,
        tools: Sequence[Tool],
        parallel: bool,
        *,
        begun: bool = False,
        schemas: Mapping[str, Any] | None = None,
    ) -> str:
        """Lark rules: `calls` is one call of one of the tools or, where it may be, several.

        `begun`: without the mark, which has come already. `schemas`: of the arguments, by the
        tool's name, where they are not the tools' own.
        """
        mark = "" if begun else self.mark
        calls = _with_blanks(*self._literals(mark), *self._literals(self.opening), "call")
        if parallel and self.separator is not None:
            calls += f" (BLANKS? {_with_blanks(*self._literals(self.separator), 'call')})*"
        calls = _with_blanks(calls, *self._literals(self.closing))
        rules = [_BLANKS, f"calls: BLANKS? {calls}"]
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
        for index, tool in enumerate(tools):
            name = tool.function.name
            schema = parameters_of(tool) if schemas is None else schemas[name]
            parts = ["{", '"name"', ":", json.dumps(name), ",", f'"{self.arguments}"', ":"]
            call = _with_blanks(*map(json.dumps, parts), json_rule(schema), '"}"')
            rules.append(f"call_{index}: {call}")
        return "\n".join(rules)

    def _literals(self, text: str) -> list[str]:
        """A text in Lark. Where it is a special token, it must be named as a token: a literal never
        matches one."""
        return [
            f"<[{self.tokens[part]}]>" if part in self.tokens else json.dumps(part)
            for part in text.split()
        ]


def _with_blanks(*parts: str) -> str:
    return " BLANKS? ".join(parts)


def parameters_of(tool: Tool) -> dict[str, Any]:
    return NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema inside of Lark."""
    return "%json " + json.dumps({**supported_schema(schema), "x-guidance": JSON_OPTIONS})


FORMATS = (
    # Hermes, Qwen.
    CallFormat(
        mark="<tool_call>",
        separator="</tool_call> <tool_call>",
        closing="</tool_call>",
        end="</tool_call>",
        arguments="arguments",
        begin=regex.compile("<tool_call>"),
    ),
    # SmolLM2.
    CallFormat(
        mark="<tool_call>",
        opening="[",
        separator=",",
        closing="] </tool_call>",
        end="</tool_call>",
        arguments="arguments",
        begin=regex.compile("<tool_call>"),
    ),
    # Mistral.
    CallFormat(
        mark="[TOOL_CALLS]",
        opening="[",
        separator=",",
        closing="]",
        arguments="arguments",
        begin=regex.compile(r"\[TOOL_CALLS\]"),
    ),
    # Llama 3: the whole message is one call.
    CallFormat(
        mark="",
        separator=None,
        closing="",
        arguments="parameters",
        begin=regex.compile(r'\s*(<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)'),
    ),
)


def find_format(
    vocabulary: Vocabulary, tokens: Mapping[str, int] | None = None
) -> CallFormat | None:
    """How this model's calls are read and written; None where its template does not say.

    `tokens`: those that the base's tokenizer has beside its vocabulary, by their texts.
    """
    written = _written_call(vocabulary)
    known = next((each for each in FORMATS if each.writes_like(written)), None)
    known = None if known is None else replace(known, tokens=tokens or {})
    own = _own_reading(vocabulary.tokenizer)
    if own is None:
        return known
    if known is None:
        return replace(FORMATS[0], response_template=own, writes=False)
    return replace(known, response_template=own)


def _own_reading(tokenizer: PreTrainedTokenizerBase) -> ResponseTemplate | None:
    own = getattr(tokenizer, "response_template", None)
    try:
        return None if own is None else load_response_template(own)
    except ValueError as error:
        log.warning("The tokenizer's response_template is passed over: %s", error)
        return None


def _written_call(vocabulary: Vocabulary) -> str:
    """A conversation with a call, as the chat template writes it; empty where it refuses."""
    tools = [{"type": "function", "function": {"name": "probe", "parameters": NO_PARAMETERS}}]
    call = {"id": new_call_id(), "type": "function", "function": _PROBE}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        return vocabulary.render(messages, tools)
    except TemplateRefused:
        return ""
