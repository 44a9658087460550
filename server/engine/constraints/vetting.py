"""Vets a grammar: compiles it within limits of time and memory, in a process that can be killed.

llguidance limits most of its work, but not all: a large `multipleOf`, or an intersection of
patterns, can take minutes. As a script, this module forks a process for each grammar.
"""

import ctypes
import json
import os
import re
import resource
import signal
import socket
from importlib.metadata import version
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

GrammarKind = Literal["json", "regex", "choice", "grammar"]

QUICK_SECONDS = 0.1
"""Of processor time. A grammar that takes longer is slow."""
CPU_SECONDS = 1
"""What is accepted takes as long again beside the model. The largest sources, of 64 KiB, take a
third of that (docs/decisions/0062-rests.md)."""
NICENESS = 10
"""The priority of slow grammars."""
MEMORY_BYTES = 2 << 30
"""Bytes of address space, of which only a part is ever used."""
WALL_SECONDS = 60.0
"""The limit on a machine that is too busy for `CPU_SECONDS` of work."""
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": " ?"}
"""At most one blank where JSON allows blanks: a model could write blanks for ever."""
if tuple(map(int, version("llguidance").split(".")[:2])) < (1, 9):
    # It lets a pattern match any number of times: no blanks but after a comma or a colon.
    JSON_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
LIMITS = LLParserLimits(
    max_items_in_row=500,
    step_max_items=5_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)
"""The first two are at most a tenth of llguidance's defaults, so that the mask of a very ambiguous
grammar takes tens of milliseconds, not seconds."""

_DIES_WITH_PARENT = 1
"""Of `prctl`."""
_REAL_SECONDS = "^[^:]*:[0-9]{2}:[0-5]"
"""Seconds below 60. llguidance allows second 60 in any minute, but validators refuse it."""
_TOKEN = re.compile(r"<\[\d+\]>")
"""A token by its id, in llguidance's Lark."""
_VALUES = {"const", "enum", "default", "examples"}
"""Keywords whose values are no schemas."""
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords whose values are schemas by name; the names are no keywords."""
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "unknown",
        "uri",
        "uuid",
    }
)
"""The formats that llguidance supports. It refuses others, which JSON Schema says to ignore."""


def compiled(kind: GrammarKind, text: str, lexicon: LLTokenizer) -> LLMatcher:
    """Compile a source to a matcher, which may be in error. Raises ValueError, RecursionError."""
    if kind == "json":
        try:
            schema = json.dumps(supported_schema(json.loads(text)))
        except RecursionError:
            raise ValueError("is nested beyond the recursion limit") from None
        source = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
    else:
        source = grammar_from(kind, text)
    return LLMatcher(lexicon, source, log_level=0, limits=LIMITS)


def supported_schema(schema: Any) -> Any:
    """Adapt a schema to llguidance: drop formats that it does not support, and exclude second 60
    from times. May raise RecursionError."""
    if isinstance(schema, list):
        return [supported_schema(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: _supported_value(key, value) for key, value in schema.items()}
    kind = inner.get("format")
    if isinstance(kind, str) and kind not in FORMATS:
        del inner["format"]
    timed = kind in ("time", "date-time")
    return {"pattern": _REAL_SECONDS} | inner if timed else inner


def _supported_value(keyword: str, value: Any) -> Any:
    if keyword in _VALUES:
        return value
    if keyword in _NAMED and isinstance(value, dict):
        return {name: supported_schema(each) for name, each in value.items()}
    return supported_schema(value)


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher cannot continue; empty if it can."""
    error = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return "comes to a dead end, where nothing matches" if error == "NoExtensionBias" else error


def _vet(link: socket.socket) -> None:
    """Write the number of this process, and read a kind, a source and whether to give up (by
    SIGPROF) where it is slow. Write why it is refused, or an empty string."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with link.makefile("rw") as stream:
        print(os.getpid(), file=stream, flush=True)
        kind, text, gives_up_if_slow = json.loads(stream.readline())
        if gives_up_if_slow:
            signal.setitimer(signal.ITIMER_PROF, QUICK_SECONDS)
        else:
            os.nice(max(0, NICENESS - os.nice(0)))
        if kind == "grammar":
            # The byte tokenizer that is used here does not have the model's token ids.
            text = _TOKEN.sub("<[0]>", text)
        try:
            # The time that a grammar takes does not depend on the tokenizer.
            problem = error_of(compiled(kind, text, LLTokenizer("byte")))
        except (ValueError, RecursionError) as error:
            problem = str(error)
        print(json.dumps(problem), file=stream)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Fork a process for each socket that is sent on the one that is the standard input, until
    that is closed."""
    control, parent = socket.socket(fileno=0), os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, links, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            try:
                _die_with(parent)
                _vet(socket.socket(fileno=links[0]))
            finally:
                os._exit(0)
        for link in links:
            os.close(link)


if __name__ == "__main__":
    main()
