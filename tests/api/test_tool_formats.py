"""Reading tool calls out of what a model writes, and grammars for writing them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.tool_formats import CallFormat, find_format
from infuse.server.api.tool_reading import Reader, make_reader
from infuse.server.api.tool_schemas import Tool
from infuse.server.engine.constraints.grammars import Grammars
from tests.chat_templates import HERMES, LLAMA, MISTRAL
from tests.factories import TOKENS, tiny_tokenizer

TEMPLATES = {"hermes": HERMES, "mistral": MISTRAL, "llama": LLAMA}
SEVERAL = ["hermes", "mistral"]
WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"city": {"enum": ["Paris", "Rome"]}},
    },
}
TOOLS = [Tool(type="function", function=WEATHER), Tool(type="function", function={"name": "stop"})]
OWN = {
    "start_anchor": "<|assistant|>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>"},
        "tool_calls": {
            "open_pattern": r"<call (?P<name>\w+)>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"content": "text", "content_args": {"strip": False}},
    },
}


def format_of(kind: str) -> CallFormat:
    found = of_tokenizer(tiny_tokenizer(TEMPLATES[kind]))
    assert found is not None
    return found


def read(reader: Reader, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    """The whole content, and the calls' names and arguments."""
    text, calls = read_raw(reader, *pieces)
    return text, [(name, json.loads(arguments)) for name, arguments in calls]


def read_raw(reader: Reader, *pieces: str) -> tuple[str, list[tuple[str, str]]]:
    """The arguments as they were written, whole or not."""
    said = [*(reader.feed(piece) for piece in pieces), reader.finish()]
    calls: list[tuple[str, str]] = []
    for part in (part for each in said for part in each.calls):
        if part.name is not None:
            assert part.index == len(calls)
            assert part.id
            assert len(part.id) == 9
            calls.append((part.name, part.arguments))
        else:
            assert (part.index, part.id) == (len(calls) - 1, None)
            calls[-1] = (calls[-1][0], calls[-1][1] + part.arguments)
    return "".join(each.content for each in said), calls


def reader_of(kind: str) -> Reader:
    return make_reader(format_of(kind), "<s>anything", TOOLS)


def written(kind: str, calls: list[tuple[str, Any]], content: str = "") -> str:
    """What the template itself writes for an answer with these calls."""
    tokenizer = tiny_tokenizer(TEMPLATES[kind])
    asked = [{"role": "user", "content": "Hi"}]
    made = [
        {
            "id": f"{index:09}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for index, (name, arguments) in enumerate(calls)
    ]
    answer = {"role": "assistant", "content": content, "tool_calls": made}
    whole = str(tokenizer.apply_chat_template([*asked, answer], tokenize=False))
    opens = kind != "mistral"
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=opens)
    return whole.removeprefix(str(prompt)).removesuffix("</s>")


def typed(form: CallFormat, calls: list[tuple[str, Any]]) -> str:
    """These calls as a model writes them."""
    several = [
        f'{{"name": "{name}", "{form.arguments}": {json.dumps(arguments)}}}'
        for name, arguments in calls
    ]
    separator = form.separator and "\n".join(["", *form.separator.split(), ""])
    return form.mark + form.opening + (separator or "").join(several) + form.closing


MARKS = st.sampled_from(["<tool_call>", "</tool_call>", "[TOOL_CALLS] [", '"}]', "\\", "{"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(MARKS, max_size=4).map("".join),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=5,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "count"]), JSON)


def of_tokenizer(tokenizer: PreTrainedTokenizerFast) -> CallFormat | None:
    return find_format(Vocabulary(tokenizer, TOKENS))


@pytest.mark.parametrize("kind", TEMPLATES)
@given(data=st.data())
def test_what_the_template_writes_is_read_back(kind: str, data: st.DataObject) -> None:
    most = 3 if kind in SEVERAL else 1
    calls = data.draw(
        st.lists(
            st.tuples(st.sampled_from(["get_weather", "stop"]), ARGUMENTS),
            min_size=1,
            max_size=most,
        )
    )
    text = written(kind, calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    assert read(reader_of(kind), *pieces) == ("", calls)
    assert read(reader_of(kind), *text) == ("", calls)


def test_what_is_said_around_calls_is_kept_without_the_formats_blanks() -> None:
    calls = [("get_weather", {"city": "Rome"}), ("stop", {})]
    text = written("hermes", calls, "Let me  look.")

    assert text.startswith("Let me  look.\n<tool_call>")
    assert read(reader_of("hermes"), text) == ("Let me  look.", calls)
    assert read(reader_of("hermes"), *text, "\n") == ("Let me  look.", calls)


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("text", ["", " \n", "Hello.\n", '{"a": 1}', "a < b <tool", "[TOOL"])
def test_an_answer_without_calls_is_verbatim(kind: str, text: str) -> None:
    assert read(reader_of(kind), text) == (text, [])
    assert read(reader_of(kind), *text) == (text, [])


@pytest.mark.parametrize(
    ("kind", "text", "content"),
    [
        ("hermes", '<tool_call>{"name": "get_we', '{"name": "get_we'),
        ("hermes", "<tool_call>nothing</tool_call>", "nothing"),
        ("hermes", '<tool_call>{"name": "stop"}</tool_call>', '{"name": "stop"}'),
        ("mistral", '[TOOL_CALLS] [{"name": 1, "arguments": {}}]', '{"name": 1, "arguments": {}}'),
        ("mistral", "[TOOL_CALLS] [1, []]", "1[]"),
        ("llama", '{"name": "stop", "param', '{"name": "stop", "param'),
    ],
)
def test_a_broken_call_is_text(kind: str, text: str, content: str) -> None:
    assert read(reader_of(kind), text) == (content, [])
    assert read(reader_of(kind), *text) == (content, [])


@pytest.mark.parametrize("kind", TEMPLATES)
def test_arguments_come_as_they_are_written(kind: str) -> None:
    reader = reader_of(kind)
    text = typed(format_of(kind), [("get_weather", {"city": "Ro]}me"})])
    said = [reader.feed(letter) for letter in text]
    parts = [part for each in said for part in each.calls]

    assert [part.name for part in parts if part.name] == ["get_weather"]
    assert "".join(part.arguments for part in parts) == '{"city": "Ro]}me"}'
    assert all(len(part.arguments) <= 1 for part in parts)
    assert "".join(each.content for each in said) + reader.finish().content == ""


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_call_that_is_cut_keeps_the_arguments_so_far(kind: str) -> None:
    text = typed(format_of(kind), [("get_weather", {"city": "Rome"})])
    cut = text[: text.index("Rome") + 2]

    assert read_raw(reader_of(kind), cut) == ("", [("get_weather", '{"city": "Ro')])
    assert read_raw(reader_of(kind), *cut) == ("", [("get_weather", '{"city": "Ro')])


def test_a_tokenizers_own_reading_is_used() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = OWN
    found = of_tokenizer(tokenizer)
    assert found is not None
    assert not found.writes
    text = '<think>so</think>Well. <call get_weather>{"city": "Rome"}</call>'

    reader = make_reader(found, "<s><|user|>Hi<|assistant|>", TOOLS)
    assert read(reader, *text) == ("soWell.", [("get_weather", {"city": "Rome"})])
    broken = make_reader(found, "<s><|user|>Hi<|assistant|>", TOOLS)
    assert read(broken, "Well. ", "<call stop>", "{", "</call>", "!")[1] == []


def test_unknown_and_missing_formats_are_none() -> None:
    malformed = tiny_tokenizer()
    malformed.response_template = {"version": 2}

    assert of_tokenizer(tiny_tokenizer()) is None
    assert of_tokenizer(malformed) is None
    assert of_tokenizer(tiny_tokenizer("{{ raise_exception('never') }}")) is None


@pytest.mark.native
@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("parallel", [False, True])
def test_the_grammar_allows_what_the_template_writes_and_no_wrong_arguments(
    kind: str, parallel: bool
) -> None:
    from infuse.server.engine.native.sequences.constraint import Constraint, MaskMaker

    grammars = Grammars(tiny_tokenizer(), TOKENS, frozenset({2}))
    rules = format_of(kind).rules(TOOLS, parallel)
    grammar = grammars.compile("grammar", f"start: calls\n{rules}", "tools")

    def allows(calls: list[tuple[str, Any]]) -> bool:
        maker, constraint = MaskMaker(), Constraint(grammar)
        text = typed(format_of(kind), calls)
        assert read(reader_of(kind), text) == ("", calls)
        for token in tiny_tokenizer().encode(text):
            if not constraint.allowed[token]:
                return False
            maker.advance([(constraint, token)])
        maker.close()
        return bool(constraint.allowed[2])

    rome, stop = ("get_weather", {"city": "Rome"}), ("stop", {})
    assert allows([rome])
    assert allows([stop])
    assert not allows([("get_weather", {"city": "Oslo"})])
    assert not allows([("get_weather", {})])
    assert not allows([("stop", {"city": "Rome"})])
    assert not allows([("nobody", {})])
    if kind in SEVERAL:
        assert allows([rome, stop, rome]) == parallel
