"""Whether a grammar compiles within bounds, tried in a process of its own that can be stopped.

llguidance counts most of its work and gives up, but not all: a large `multipleOf`, or an
intersection of patterns, can take minutes. Run as a script, this compiles what it reads.
"""

import json
import re
import resource
import sys
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

GrammarKind = Literal["json", "regex", "choice", "grammar"]

CPU_SECONDS = 4
MEMORY_BYTES = 2 << 30
"""Bytes of addresses: more than is ever touched."""
WALL_SECONDS = 60.0
"""On a machine too busy for `CPU_SECONDS` of work."""
JSON_OPTIONS = {"whitespace_pattern": " ?"}
"""Where JSON may have blanks, one at most: a model could go on writing them for ever."""
LIMITS = LLParserLimits(
    max_items_in_row=500,
    step_max_items=5_000,
    max_lexer_states=50_000,
    verbose_errors=False,
)
"""The first two are llguidance's own by a tenth and less: the masks of a very ambiguous grammar
take tens of milliseconds then, not seconds."""


_REAL_SECONDS = "^[^:]*:[0-9]{2}:[0-5]"
"""llguidance takes second 60 for one of any minute, and validators refuse it."""
_TOKEN = re.compile(r"<\[\d+\]>")
"""Lark's name of a token, by its id."""
_VALUES = {"const", "enum", "default", "examples"}
"""Keywords whose values are no schemas."""
_NAMED = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
"""Keywords that hold schemas by names, which are no keywords."""
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
"""All that llguidance knows. It refuses others, which JSON Schema says are to be ignored."""


def compiled(kind: GrammarKind, text: str, lexicon: LLTokenizer) -> LLMatcher:
    """A matcher, which may be in error. Raises ValueError and RecursionError."""
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
    """The schema as llguidance takes it: without formats that it does not know, and with times
    that have no second 60. May raise RecursionError."""
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
    """Why a matcher cannot go on; empty where it can."""
    error = matcher.get_error().removesuffix("<non-verbose/>").strip()
    return "comes to a dead end, where nothing matches" if error == "NoExtensionBias" else error


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kind, text = json.load(sys.stdin)
    if kind == "grammar":
        # The bytes that it is tried with have no tokens of the tokenizer's.
        text = _TOKEN.sub("<[0]>", text)
    try:
        # What takes long does not depend on the tokenizer.
        problem = error_of(compiled(kind, text, LLTokenizer("byte")))
    except (ValueError, RecursionError) as error:
        problem = str(error)
    print(json.dumps(problem))


if __name__ == "__main__":
    main()
