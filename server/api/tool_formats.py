"""How a model writes its tool calls, found out from its own chat template.

Calls are read by transformers' `ResponseParser`, by the tokenizer's own `response_template` where
it has one. Otherwise the chat template is asked to write a call, and the known format that looks
so is taken.
"""

import json
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)

from adapters.errors import TemplateRefused
from adapters.vocabulary import Vocabulary
from server.api.tool_schemas import NO_PARAMETERS, CalledFunction, Tool, ToolCall
from server.engine.vetting import JSON_OPTIONS

log = logging.getLogger(__name__)

_PROBE = {"name": "probe", "arguments": {"x": 1}}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """`{"name": …, <arguments>: {…}}`, one or several, between `opening` and `closing`."""

    opening: str
    separator: str | None
    """Between two calls; None where there can be one only."""
    closing: str
    arguments: str
    writes: bool = True
    """False where only the reading is known, so that no grammar can be made."""
    response_template: ResponseTemplate

    def writes_like(self, written: str) -> bool:
        call = f'{self.opening}{{"name": "probe", "{self.arguments}": {{"x": 1}}'
        return "".join(call.split()) in "".join(written.split())

    def rules(self, tools: Sequence[Tool], parallel: bool) -> str:
        """Lark rules: `calls` is one call of one of the tools or, where it may be, several."""
        more = parallel and self.separator is not None
        several = f" ({json.dumps(self.separator)} call)*" if more else ""
        opening, closing = (json.dumps(m) if m else "" for m in (self.opening, self.closing))
        rules = [f"calls: {opening} call{several} {closing}"]
        rules.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
        for index, tool in enumerate(tools):
            begin = json.dumps(f'{{"name": "{tool.function.name}", "{self.arguments}": ')
            rules.append(f'call_{index}: {begin} {json_rule(parameters_of(tool))} "}}"')
        return "\n".join(rules)


def parameters_of(tool: Tool) -> dict[str, Any]:
    return NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters


def json_rule(schema: Mapping[str, Any]) -> str:
    """A JSON schema inside of Lark."""
    return "%json " + json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _reading(**anchors: str | bool) -> ResponseTemplate:
    """A response template of calls in JSON, between free text."""
    calls = {"content": "json", "content_args": {"allow_non_json": True}, **anchors}
    content = {"content": "text", "content_args": {"strip": False}}
    fields = {"tool_calls": calls, "content": content}
    # An answer begins where the prompt ends.
    return load_response_template({"start_anchor_pattern": r"\Z", "fields": fields})


FORMATS = (
    # Hermes, Qwen.
    CallFormat(
        opening="<tool_call>\n",
        separator="\n</tool_call>\n<tool_call>\n",
        closing="\n</tool_call>",
        arguments="arguments",
        response_template=_reading(open="<tool_call>", close="</tool_call>", repeats=True),
    ),
    # Mistral.
    CallFormat(
        opening="[TOOL_CALLS][",
        separator=", ",
        closing="]",
        arguments="arguments",
        response_template=_reading(open="[TOOL_CALLS]", repeats=True),
    ),
    # Llama 3: the whole message is one call.
    CallFormat(
        opening="",
        separator=None,
        closing="",
        arguments="parameters",
        response_template=_reading(
            open_pattern=r'^\s*(<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)', repeats=True
        ),
    ),
)


def find_format(vocabulary: Vocabulary) -> CallFormat | None:
    """How this model's calls are read and written; None where its template does not say."""
    written = _written_call(vocabulary)
    known = next((each for each in FORMATS if each.writes_like(written)), None)
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


def new_call_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return uuid.uuid4().hex[:9]


@dataclass(frozen=True, slots=True)
class Said:
    content: str
    calls: list[ToolCall]


class CallReader:
    """Splits the text of one choice, as it comes, into what is said and what is called."""

    def __init__(self, format: CallFormat, prompt: str, tools: Sequence[Tool]) -> None:
        self._parser: ResponseParser | None = ResponseParser(
            format.response_template, prompt, tools=[tool.for_template() for tool in tools]
        )
        self._unread = ""
        """Fed, but neither said nor called yet."""
        self._blanks = ""
        """Said last; around calls they belong to the format, not to the answer."""
        self._called = False

    def feed(self, text: str) -> Said:
        return self._read(text, ends=False)

    def finish(self) -> Said:
        return self._read("", ends=True)

    def _read(self, text: str, ends: bool) -> Said:
        if self._parser is None:
            return Said(text, [])
        self._unread += text
        try:
            events = self._parser.finalize()[1] if ends else self._parser.feed(text)
        except (ValueError, KeyError, TypeError, RecursionError):
            # A tokenizer's own template reads no broken calls: from here on all is text.
            self._parser = None
            return Said(self._unread, [])
        content, calls = "", []
        for event in events:
            if event["type"] == "region_chunk" and event["field"] != "tool_calls":
                content += event["text"]
                self._unread = self._unread.partition(event["text"])[2]
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                found, broken = _calls_in(event["value"])
                calls += found
                content += broken
                self._unread = ""
        self._called |= bool(calls)
        content = self._blanks + content
        if ends and not self._called:
            return Said(content, [])
        said = content.rstrip()
        self._blanks = "" if calls else content[len(said) :]
        return Said(said, calls)


def _calls_in(value: Any) -> tuple[list[ToolCall], str]:
    """The calls of a parsed region, and the text of those that are none."""
    calls: list[ToolCall] = []
    broken = ""
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function", each) if isinstance(each, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", function.get("parameters")) if name else None
        if isinstance(name, str) and isinstance(arguments, dict):
            text = json.dumps(arguments, ensure_ascii=False)
            called = CalledFunction(name=name, arguments=text)
            calls.append(ToolCall(id=new_call_id(), type="function", function=called))
        else:
            broken += each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
    return calls, broken
