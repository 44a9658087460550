"""Reads the tool calls in an answer while it is generated."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import regex
from transformers.utils.chat_parsing import ResponseParser

from infuse.server.api.tool_formats import CallFormat
from infuse.server.api.tool_schemas import Tool, new_call_id

_HEAD = regex.compile(
    r'\s*\[?\s*\{\s*"name"\s*:\s*"(?P<name>[\w.-]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
"""A call up to its arguments."""
_MARKS = regex.compile(r'\\.|["{}\[\]]', regex.DOTALL)
"""The characters by which the end of a JSON value is found."""


@dataclass(frozen=True, slots=True)
class CallPart:
    """The next part of a call's arguments; a call's first part also has its id and its name."""

    index: int
    """The call's number in the answer."""
    arguments: str
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """The text and the tool calls in a part of an answer."""

    content: str
    calls: list[CallPart]


class Reader(Protocol):
    """Splits the text of one choice, as it comes, into content and tool calls."""

    def feed(self, text: str) -> Said: ...

    def finish(self) -> Said: ...


def make_reader(format: CallFormat, prompt: str, tools: Sequence[Tool]) -> Reader:
    """`prompt`: the text before the answer, in which a tokenizer's own template may read too."""
    if format.has_own_reading:
        return TemplateReader(format, prompt, tools)
    return JsonReader(format, tools)


class _Blanks:
    """Leaves blanks around calls out of the content: they belong to the format."""

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def said(self, content: str, calls: list[CallPart], ends: bool) -> Said:
        self._called |= bool(calls)
        content = self._held + content
        if ends and not self._called:
            return Said(content, [])
        said = content.rstrip()
        self._held = "" if calls else content[len(said) :]
        return Said(said, calls)


class JsonReader:
    """Reads calls of a known format part by part: arguments come as the model writes them."""

    def __init__(self, format: CallFormat, tools: Sequence[Tool]) -> None:
        self._format = format
        self._names = {tool.function.name for tool in tools}
        self._blanks = _Blanks()
        self._state: Callable[[bool], bool] = self._say
        self._unread = ""
        self._begins = True
        """Whether nothing has been read yet: a call may then be the whole answer."""
        self._depth = 0
        self._in_string = False
        self._calls = 0
        self._content = ""
        self._parts: list[CallPart] = []

    def feed(self, text: str) -> Said:
        return self._read(text, ends=False)

    def finish(self) -> Said:
        return self._read("", ends=True)

    def _read(self, text: str, ends: bool) -> Said:
        self._unread += text
        while self._state(ends):
            pass
        said = self._blanks.said(self._content, self._parts, ends)
        self._content, self._parts = "", []
        return said

    # Each state reads what it can, and returns whether another may read on.

    def _say(self, ends: bool) -> bool:
        found = None
        if not self._format.is_whole_answer:
            found = self._format.begin.search(self._unread, partial=not ends)
        elif self._begins:
            found = self._format.begin.match(self._unread, partial=not ends)
        said = self._unread if found is None else self._unread[: found.start()]
        self._content += said
        self._begins = found is not None and found.partial
        if found is None or found.partial:
            self._unread = self._unread[len(said) :]
            return False
        self._unread = self._unread[found.end() :]
        self._state = self._open
        return True

    def _open(self, ends: bool) -> bool:
        """Read a call's name, up to its arguments."""
        head = _HEAD.match(self._unread, partial=not ends)
        if head is not None and head.partial:
            return False
        if head is None or head["name"] not in self._names:
            self._state = self._pass_over
            return True
        self._begin_call(head["name"])
        self._unread = self._unread[head.end() :]
        self._depth, self._in_string = 0, False
        self._state = self._arguments
        return True

    def _arguments(self, ends: bool) -> bool:
        """Read the arguments, up to their last bracket."""
        text, is_whole = self._read_value(ends)
        self._add_arguments(text)
        if is_whole:
            self._depth = 1
            self._state = self._members
        return is_whole

    def _members(self, ends: bool) -> bool:
        """Pass over what else the call's object holds: Mistral's calls may have an id."""
        _, is_whole = self._read_value(ends)
        if is_whole:
            self._state = self._after
        return is_whole

    def _read_value(self, ends: bool) -> tuple[str, bool]:
        """The next text of a JSON value in brackets, and whether that is all of it."""
        text = self._unread
        backslashes = len(text) - len(text.rstrip("\\"))
        # A lone one belongs to the character that is still to come.
        end = len(text) - (0 if ends else backslashes % 2)
        is_whole = False
        for mark in _MARKS.finditer(text, 0, end):
            if mark[0] == '"':
                self._in_string = not self._in_string
            elif not self._in_string and mark[0] in "{[":
                self._depth += 1
            elif not self._in_string and mark[0] in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end, is_whole = mark.end(), True
                    break
        self._unread = text[end:]
        return text[:end], is_whole

    def _after(self, ends: bool) -> bool:
        """Read what follows a call: another call of a list, or the end of the calls."""
        rest = self._unread.lstrip(" \t\r\n]")
        close = self._format.end
        if rest.startswith(","):
            self._unread = rest[1:]
            self._state = self._open
            return True
        if not ends and (not rest or (close and close.startswith(rest) and rest != close)):
            self._unread = rest
            return False
        self._unread = rest.removeprefix(close)
        self._state = self._say
        return True

    def _pass_over(self, ends: bool) -> bool:
        """Read a call that is not in the known form, as a whole, once its end has come."""
        close = self._format.end
        at = self._unread.find(close) if close else -1
        if at < 0 and not ends:
            return False
        whole = self._unread if at < 0 else self._unread[:at]
        self._unread = "" if at < 0 else self._unread[at + len(close) :]
        try:
            value = json.loads(whole)
        except (ValueError, RecursionError):
            value = whole.strip()
        calls, broken = calls_in(value)
        for name, arguments in calls:
            self._begin_call(name)
            self._add_arguments(arguments)
        self._content += broken
        self._state = self._say
        return True

    def _begin_call(self, name: str) -> None:
        self._parts.append(CallPart(self._calls, "", new_call_id(), name))
        self._calls += 1

    def _add_arguments(self, text: str) -> None:
        last = self._parts[-1] if self._parts else None
        if last is not None and last.index == self._calls - 1:
            joined = last.arguments + text
            self._parts[-1] = CallPart(last.index, joined, last.id, last.name)
        elif text:
            self._parts.append(CallPart(self._calls - 1, text))


class TemplateReader:
    """Reads calls by the tokenizer's own `response_template`, each as a whole."""

    def __init__(self, format: CallFormat, prompt: str, tools: Sequence[Tool]) -> None:
        assert format.response_template is not None
        self._parser: ResponseParser | None = ResponseParser(
            format.response_template, prompt, tools=[tool.for_template() for tool in tools]
        )
        self._unread = ""
        """Text that was fed, and is not part of a content or a call yet."""
        self._blanks = _Blanks()
        self._calls = 0

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
        content, parts = "", list[CallPart]()
        for event in events:
            if event["type"] == "region_chunk" and event["field"] != "tool_calls":
                content += event["text"]
                self._unread = self._unread.partition(event["text"])[2]
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                calls, broken = calls_in(event["value"])
                for name, arguments in calls:
                    parts.append(CallPart(self._calls, arguments, new_call_id(), name))
                    self._calls += 1
                content += broken
                self._unread = ""
        return self._blanks.said(content, parts, ends)


def calls_in(value: Any) -> tuple[list[tuple[str, str]], str]:
    """The names and arguments of the calls in parsed JSON, and the text of what is none."""
    calls: list[tuple[str, str]] = []
    broken = ""
    for each in value if isinstance(value, list) else [value]:
        function = each.get("function", each) if isinstance(each, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments", function.get("parameters")) if name else None
        if isinstance(name, str) and isinstance(arguments, dict):
            calls.append((name, json.dumps(arguments, ensure_ascii=False)))
        else:
            broken += each if isinstance(each, str) else json.dumps(each, ensure_ascii=False)
    return calls, broken
