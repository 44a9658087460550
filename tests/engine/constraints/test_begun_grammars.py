"""Grammars that begin in the midst of an answer: the model decides whether it calls a tool."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import regex

from infuse.server.api.tool_formats import FORMATS
from infuse.server.api.tool_schemas import Tool
from infuse.server.engine import FinishReason, GenerationRequest, SamplingParams
from infuse.server.engine.constraints.grammars import Grammar, Grammars
from infuse.server.engine.native.sequences.sequence import Sequence
from tests.engine.constraints.test_constraints import END, compiled, reaches
from tests.engine.harness import Harness
from tests.factories import TOKENS, tiny_tokenizer

Start = Callable[..., Harness]
NAME = "a" * 64
"""As long as a function's name may be."""


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tiny_tokenizer(), TOKENS, frozenset({END}))


def awaiting(grammar: Grammar, begin: Any) -> Sequence:
    """A sequence whose grammar has not begun."""
    params = SamplingParams(max_tokens=8, grammar=grammar, grammar_begin=begin)
    request = GenerationRequest(id="one", prompt=(5,), params=params)
    return Sequence(request, 0, tiny_tokenizer())


def test_a_grammar_may_begin_in_the_midst_of_an_answer(start: Start) -> None:
    harness = start()
    digits = compiled(harness.engine.grammars, "regex", "[0-9]{3}")
    letter = tiny_tokenizer().encode("F")[0]
    params = {
        "grammar": digits,
        "grammar_begin": regex.compile("FF"),
        "ignore_eos": False,
        "max_tokens": 20,
    }
    with harness.held():
        for name, bias in (("calls", {letter: 100.0}), ("says", {letter: -100.0, END: -100.0})):
            harness.submit(name, [5], logit_bias=bias, temperature=1.0, seed=3, **params)
    harness.wait()

    calls, says = harness.answers["calls"], harness.answers["says"]
    assert re.fullmatch("FF[0-9]{3}", calls.text)
    assert calls.finish is FinishReason.STOP
    assert (says.finish, len(says.tokens)) == (FinishReason.LENGTH, 20)


def test_a_grammar_goes_on_behind_what_its_beginning_brought(grammars: Grammars) -> None:
    grammar = compiled(grammars, "regex", "[0-9]{3}")

    rest = grammar.after("12")
    assert rest is not None
    assert reaches(rest, "3") == (True, True)
    assert reaches(rest, "34") == (False, False)
    assert grammar.after("") is grammar
    assert grammar.after("x") is None
    assert grammar.after("1234") is None


@pytest.mark.parametrize("blanks", ["", "\n  "])
def test_a_call_of_the_longest_name_is_found_however_it_comes(
    grammars: Grammars, blanks: str
) -> None:
    [llama] = [form for form in FORMATS if form.is_whole_answer]
    tools = [Tool(type="function", function={"name": NAME})]
    rules = llama.rules(tools, False, begun=True)
    grammar = compiled(grammars, "grammar", f"start: calls\n{rules}")
    head = f'{blanks}{{"name": "{NAME}", "parameters"'

    for pieces in ([head], list(head)):
        sequence = awaiting(grammar, llama.beginning_of(tools))
        for piece in pieces:
            assert sequence.constraint is None
            sequence.see(piece)
        assert sequence.constraint is not None


@pytest.mark.parametrize("said", [0, 1, 255, 256, 257, 5000])
def test_a_mark_is_found_in_an_answer_of_any_length(grammars: Grammars, said: int) -> None:
    sequence = awaiting(compiled(grammars, "regex", "[0-9]{3}"), regex.compile("<call>"))

    for character in "x" * said + "<call>":
        assert sequence.constraint is None
        sequence.see(character)
    assert sequence.constraint is not None


@pytest.mark.parametrize("said", [1, 255, 256, 257, 5000])
def test_what_begins_an_answer_is_not_found_later_in_it(grammars: Grammars, said: int) -> None:
    sequence = awaiting(compiled(grammars, "regex", "[0-9]{3}"), regex.compile(r"\A<call>"))

    for character in "x" * said + "<call>" * 100:
        sequence.see(character)
    assert sequence.constraint is None


def test_a_token_takes_no_longer_in_a_long_answer(grammars: Grammars) -> None:
    searched = []

    class Mark:
        def search(self, text: str, _: int) -> None:
            searched.append(len(text))

    sequence = awaiting(compiled(grammars, "regex", "[0-9]{3}"), Mark())
    for _ in range(5000):
        sequence.see("x")
    assert max(searched) < 1000
