"""Rows whose answers must match a grammar, in batches with rows that need not."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from infuse.server.engine import BadConstraint, ConstraintsUnavailable, FinishReason
from infuse.server.engine.constraints import grammars as constraints
from infuse.server.engine.constraints.grammars import (
    MAX_CHARACTERS,
    Grammar,
    Grammars,
)
from infuse.server.engine.constraints.vetting import FORMATS
from infuse.server.engine.native.sequences.constraint import Constraint, MaskMaker
from tests.engine.harness import Harness
from tests.factories import TOKENS, tiny_tokenizer

Start = Callable[..., Harness]
END = 2
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"enum": [1, 22, 333]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), TOKENS, frozenset({END}))


def compiled(grammars: Grammars, kind: Any, source: object) -> Grammar:
    return grammars.compile(kind, source, "the grammar")


def refusal(grammars: Grammars, kind: Any, source: object) -> str:
    with pytest.raises(BadConstraint) as refused:
        compiled(grammars, kind, source)
    return str(refused.value)


def reaches(grammar: Grammar, text: str) -> tuple[bool, bool]:
    """Whether the tokens of `text` are all allowed, and the end token after them."""
    maker, constraint = MaskMaker(), Constraint(grammar)
    for token in tiny_tokenizer().encode(text):
        if not constraint.allowed[token]:
            return False, False
        maker.advance([(constraint, token)])
    may_end = bool(constraint.allowed[END])
    maker.close()
    return True, may_end


@pytest.mark.parametrize(
    ("kind", "source", "whole", "begun", "wrong"),
    [
        ("json", PERSON, '{"name": "Ada", "age": 22}', '{"name":"Ad', '{"age"'),
        ("regex", "[a-c]{2,3}x", "abx", "ab", "abb "),
        ("choice", ["yes", 'no "\\d" é'], 'no "\\d" é', "ye", "yes!"),
        ("grammar", 'start: "a" start "b" | "ab"', "aaabbb", "aab", "aba"),
        ("grammar", 'root ::= "a" [0-9]+', "a12", "a", "1"),
    ],
)
def test_the_end_token_is_allowed_exactly_where_the_grammar_may_end(
    grammars: Grammars, kind: str, source: object, whole: str, begun: str, wrong: str
) -> None:
    grammar = compiled(grammars, kind, source)

    assert reaches(grammar, whole) == (True, True)
    assert reaches(grammar, begun) == (True, False)
    assert reaches(grammar, wrong) == (False, False)


@pytest.mark.parametrize(("kind", "date"), [("time", ""), ("date-time", "2026-06-07T")])
def test_no_minute_has_a_second_60(grammars: Grammars, kind: str, date: str) -> None:
    grammar = compiled(grammars, "json", {"type": "object", "properties": {"at": {"format": kind}}})

    assert reaches(grammar, f'{{"at": "{date}20:33:59Z"}}') == (True, True)
    assert reaches(grammar, f'{{"at": "{date}20:33:60Z"}}') == (False, False)


def test_blanks_in_json_are_few(grammars: Grammars) -> None:
    grammar = compiled(grammars, "json", {"type": "array", "items": {"type": "integer"}})

    assert reaches(grammar, "[ 1 , 2 ]") == (True, True)
    assert reaches(grammar, "[  1") == (False, False)
    assert reaches(grammar, "[\n") == (False, False)


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("json", {"type": "objekt"}, "at $.type, 'objekt'"),
        ("json", {"properties": {"a": {"items": {"minLength": -1}}}}, "$.properties.a.items.minLe"),
        ("json", {"properties": {"a": {"not": {}}}}, "not supported: $.properties.a.not"),
        ("json", {"anyOf": [{}, {"if": {}}]}, "not supported: $.anyOf[1].if"),
        ("json", {"$ref": "#/$defs/none"}, "Pointer '/$defs/none' does not exist"),
        ("json", {"$ref": "http://example.com/x"}, "Default retriever does not fetch"),
        ("json", {"type": "integer", "minimum": 3, "maximum": 1}, "minimum (3) is greater"),
        ("json", {"type": "string", "pattern": "(a"}, "unclosed group"),
        ("json", {"$ref": "#"}, "comes to a dead end"),
        ("json", "objekt", "at $, 'objekt' is not of type 'object'"),
        ("json", {"const": float("nan")}, "is no JSON"),
        ("json", {"enum": ["x" * MAX_CHARACTERS]}, f"keep it below {MAX_CHARACTERS}"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("grammar", "start: nobody", 'unknown name: "nobody"'),
        ("grammar", "root ::= (", "Expected ')'"),
        ("grammar", "", "No 'root' rule found"),
        ("grammar", 'start: start "a"', "comes to a dead end"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_place(
    grammars: Grammars, kind: str, source: object, said: str
) -> None:
    message = refusal(grammars, kind, source)

    assert message.startswith("the grammar ")
    assert said in message


def test_deep_schemas_are_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"properties": {"a": schema}}
    assert "recursion limit" in refusal(grammars, "json", schema)
    for _ in range(100_000):
        schema = {"items": schema}
    assert "is no JSON" in refusal(grammars, "json", schema)


def test_a_grammar_that_would_take_minutes_is_refused(grammars: Grammars) -> None:
    assert "to compile" in refusal(grammars, "json", {"type": "integer", "multipleOf": 9999937})


def test_a_repeated_grammar_is_compiled_once(grammars: Grammars) -> None:
    assert compiled(grammars, "json", PERSON) is compiled(grammars, "json", dict(PERSON))
    assert compiled(grammars, "regex", "a") is not compiled(grammars, "grammar", 'start: "a"')


def test_answers_of_a_mixed_batch_match_their_own_grammars(start: Start) -> None:
    harness = start()
    grammars = harness.engine.grammars
    with harness.held():
        for row in range(8):
            params = {"temperature": row % 2 * 0.8, "seed": row, "max_tokens": 100}
            schema = compiled(grammars, "json", PERSON)
            pattern = compiled(grammars, "regex", "[a-z]{3,9}[0-9]{1,9};")
            choice = compiled(grammars, "choice", ["yes", "no", "perhaps"])
            harness.submit(f"json-{row}", [5 + row], "default", grammar=schema, **params)
            harness.submit(f"regex-{row}", [5 + row], grammar=pattern, **params)
            harness.submit(f"choice-{row}", [5 + row], "queries", grammar=choice, **params)
    harness.wait()

    for name, answer in harness.answers.items():
        assert answer.finish is FinishReason.STOP, name
        if name.startswith("json"):
            found = json.loads(answer.text)
            assert len(found["name"]) <= 5
            assert found["age"] in (1, 22, 333)
        elif name.startswith("regex"):
            assert re.fullmatch("[a-z]{3,9}[0-9]{1,9};", answer.text)
        else:
            assert answer.text in ("yes", "no", "perhaps")
        assert answer.tokens[-1] == END
    harness.assert_idle()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_grammar_are_untouched(start: Start, temperature: float) -> None:
    harness = start()
    params = {"temperature": temperature, "max_tokens": 24, "logprobs": 3}
    found = []
    for constrains in (False, True):
        pattern = compiled(harness.engine.grammars, "regex", ".{24}")
        with harness.held():
            for row in range(16):
                grammar = pattern if row % 2 and constrains else None
                harness.submit(str(row), [5 + row, 9], grammar=grammar, seed=row, **params)
        harness.wait()
        found.append([harness.answers[str(row)] for row in range(0, 16, 2)])
        others = [harness.answers.pop(str(row)) for row in range(16)][1::2]
        assert all(other.finish is FinishReason.LENGTH for other in others)

    for without, with_others in zip(*found, strict=True):
        assert without == with_others


def test_the_limit_cuts_the_answer(start: Start) -> None:
    harness = start()
    grammar = compiled(harness.engine.grammars, "json", {"type": "array", "minItems": 50})

    answer = harness.ask([5], grammar=grammar, max_tokens=7, seed=1, temperature=1.0)

    assert answer.finish is FinishReason.LENGTH
    assert len(answer.tokens) == 7


def test_an_answer_waits_for_min_tokens_where_its_grammar_can_go_on(start: Start) -> None:
    harness = start()
    open_end = compiled(harness.engine.grammars, "regex", "[ab]+")
    fixed = compiled(harness.engine.grammars, "choice", ["ab"])
    params = {"min_tokens": 9, "max_tokens": 20, "logit_bias": {END: 100.0}, "ignore_eos": False}

    assert len(harness.ask([5], grammar=open_end, **params).tokens) == 10
    early = harness.ask([5], grammar=fixed, **params)

    assert (early.text, early.finish) == ("ab", FinishReason.STOP)


def test_end_tokens_are_ignored_until_the_grammar_ends(start: Start) -> None:
    harness = start()
    grammar = compiled(harness.engine.grammars, "regex", "[ab]{1,12}")
    params = {"max_tokens": 40, "logit_bias": {END: 100.0}, "grammar": grammar}

    assert len(harness.ask([5], ignore_eos=False, **params).text) == 1
    assert len(harness.ask([5], ignore_eos=True, **params).text) == 12


def test_stop_strings_penalties_and_filters_choose_among_what_is_allowed(start: Start) -> None:
    harness = start()
    grammar = compiled(harness.engine.grammars, "regex", "[abcd]{30}")
    params: dict[str, Any] = {"grammar": grammar, "max_tokens": 40}
    b = tiny_tokenizer().encode("b")[0]

    stopped = harness.ask([5], stop=("c",), temperature=1.0, seed=3, **params)
    biased = harness.ask([5], logit_bias={b: 100.0}, **params)
    mixed = harness.ask([5], frequency_penalty=2.0, presence_penalty=2.0, **params)
    filtered = harness.ask([5], temperature=1.5, top_k=3, top_p=0.9, seed=1, **params)

    assert (stopped.finish, set(stopped.text) - set("abd")) == (FinishReason.STOP, set())
    assert biased.text == "b" * 30
    assert len(set(mixed.text)) == 4
    assert re.fullmatch("[abcd]{30}", filtered.text)


def test_logprobs_are_of_the_unconstrained_distribution(start: Start) -> None:
    harness = start()
    grammar = compiled(harness.engine.grammars, "choice", ["yes"])

    answer = harness.ask([5, 9], grammar=grammar, logprobs=2)
    free = harness.ask([5, 9], max_tokens=1, logprobs=2)

    assert answer.text == "yes"
    assert answer.logprobs[0].top == free.logprobs[0].top
    assert answer.logprobs[0].logprob < free.logprobs[0].logprob


def test_a_preempted_answer_still_matches(start: Start) -> None:
    harness = start(kv_cache_tokens=512)
    grammar = compiled(harness.engine.grammars, "regex", "[a-z]{120}")
    with harness.held():
        for row in range(8):
            harness.submit(str(row), [5 + row], grammar=grammar, max_tokens=150)
    harness.wait()

    assert harness.engine.stats().preemptions > 0
    for row in range(8):
        assert re.fullmatch("[a-z]{120}", harness.answers[str(row)].text)
    harness.assert_idle()


def test_a_grammar_that_outgrows_its_limits_ends_its_own_request_only(start: Start) -> None:
    harness = start()
    hostile = compiled(harness.engine.grammars, "grammar", 'start: s\ns: s s s | s s | "a" | "b"')
    with harness.held():
        harness.submit("hostile", [5], grammar=hostile, max_tokens=200)
        harness.submit("other", [5], max_tokens=100)
    harness.wait()

    assert harness.answers["hostile"].finish is FinishReason.CONSTRAINT
    assert "items" in harness.answers["hostile"].error
    assert harness.answers["other"].finish is FinishReason.LENGTH
    harness.assert_idle()


def test_an_answer_that_comes_to_a_dead_end_fails(start: Start) -> None:
    harness = start()
    grammar = compiled(harness.engine.grammars, "grammar", 'start: "a" no\nno: no "b"')

    answer = harness.ask([5], grammar=grammar)

    assert answer.finish is FinishReason.CONSTRAINT
    assert "dead end" in answer.error


def test_a_vocabulary_larger_than_the_tokenizers_is_masked_whole() -> None:
    grammars = Grammars(tiny_tokenizer(), TOKENS + 39, frozenset({END}))
    constraint = Constraint(compiled(grammars, "choice", ["a"]))

    expected = torch.zeros(TOKENS + 39, dtype=torch.bool)
    expected[tiny_tokenizer().encode("a")] = True
    assert torch.equal(constraint.allowed, expected)


def test_a_format_that_is_not_known_is_ignored(grammars: Grammars) -> None:
    for kind in ("int64", "cpf", "url", "regex", "idn-email"):
        grammar = compiled(grammars, "json", {"type": "string", "format": kind})
        assert reaches(grammar, '"anything"') == (True, True)
    nested = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "colour"},
            "default": {"type": "integer", "format": "int32"},
            "const": {"const": {"format": "colour"}},
        },
        "required": ["format", "default", "const"],
        "$defs": {"examples": {"format": "colour"}},
        "additionalProperties": False,
    }
    text = '{"format": "red", "default": 3, "const": {"format": "colour"}}'
    assert reaches(compiled(grammars, "json", nested), text) == (True, True)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_a_format_that_is_known_compiles(grammars: Grammars, kind: str) -> None:
    compiled(grammars, "json", {"type": "string", "format": kind})


def test_a_format_that_is_known_is_held(grammars: Grammars) -> None:
    grammar = compiled(grammars, "json", {"type": "string", "format": "ipv4"})

    assert reaches(grammar, '"10.0.0.1"') == (True, True)
    assert reaches(grammar, '"ten"') == (False, False)


def test_what_only_describes_is_ignored(grammars: Grammars) -> None:
    notes = {
        "title": "a",
        "description": "b",
        "default": 1,
        "examples": [1],
        "example": 1,
        "deprecated": True,
        "readOnly": True,
        "writeOnly": True,
        "contentMediaType": "text/html",
        "contentEncoding": "base64",
        "nullable": True,
        "discriminator": {},
        "xml": {},
        "x-order": 1,
        "$comment": "c",
        "$schema": "http://json-schema.org/draft-07/schema#",
        "unheard-of": {},
    }
    grammar = compiled(grammars, "json", {"type": "string", **notes})

    assert reaches(grammar, '"a"') == (True, True)


def test_a_tokenizer_that_cannot_be_constrained_is_asked_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuse(*_: object, **__: object) -> None:
        asked.append(1)
        raise ValueError("no fast tokenizer")

    monkeypatch.setattr(constraints, "from_tokenizer", refuse)
    grammars = Grammars(tiny_tokenizer(), TOKENS, frozenset({END}))

    for source in ("a", "b"):
        with pytest.raises(ConstraintsUnavailable, match="no fast tokenizer"):
            compiled(grammars, "regex", source)
    assert len(asked) == 1
