"""Patterns of adapters, and what a scope may say."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from infuse.adapters.storage.names import NAME_PATTERN
from infuse.server.keys.scope import AdapterPatterns, Scope

NAMES = st.from_regex(re.compile(NAME_PATTERN), fullmatch=True)
PATTERNS = st.from_regex(re.compile(r"[a-c/*?.-]{1,6}|\[[!]?[a-c]+\]\*"), fullmatch=True)
SHORT = st.from_regex(re.compile(r"[a-c][a-c.-]{0,4}(/[a-c]{1,3})?"), fullmatch=True)


@given(NAMES, st.lists(PATTERNS, max_size=3), st.lists(PATTERNS, max_size=3))
def test_what_may_be_used_or_changed_may_be_seen(
    name: str, use: list[str], change: list[str]
) -> None:
    patterns = AdapterPatterns(use=tuple(use), change=tuple(change))

    assert patterns.may_see(name) == (patterns.may_use(name) or patterns.may_change(name))


@given(NAMES, NAMES)
def test_a_name_is_a_pattern_of_itself_alone(name: str, other: str) -> None:
    patterns = AdapterPatterns(use=(name,))

    assert patterns.may_use(name)
    assert patterns.may_use(other) == (name == other)


@given(NAMES, NAMES)
def test_the_names_of_an_owner_are_those_before_its_slash(owner: str, name: str) -> None:
    patterns = AdapterPatterns(change=(f"{owner}/*",))

    assert patterns.may_change(f"{owner}/{name}")
    assert patterns.may_change(name) == name.startswith(f"{owner}/")


@given(SHORT, PATTERNS)
def test_a_pattern_is_a_shells(name: str, pattern: str) -> None:
    words = {"*": ".*", "?": "."}
    parts = re.findall(r"\[!?[a-c]+\]|.", pattern)
    regex = "".join(
        words.get(part) or (part.replace("[!", "[^") if len(part) > 1 else re.escape(part))
        for part in parts
    )

    assert AdapterPatterns(see=(pattern,)).may_see(name) == bool(re.fullmatch(regex, name))


def test_no_patterns_match_nothing_and_none_at_all_matches_everything() -> None:
    assert not AdapterPatterns().may_see("a")
    assert not Scope().is_tenants
    assert Scope(adapters=AdapterPatterns()).is_tenants


def test_a_tenant_fetches_from_nowhere_unless_its_scope_says_where() -> None:
    assert Scope().source_prefixes is None
    assert Scope(adapters=AdapterPatterns()).source_prefixes == ()
    own = Scope(adapters=AdapterPatterns(), sources=("hf://acme/",)).source_prefixes
    assert own is not None
    assert [str(each) for each in own] == ["hf://acme"]


@pytest.mark.parametrize(
    ("scope", "where"),
    [
        ({"adapters": {"use": "acme/*"}}, "adapters.use"),
        ({"adapters": {"use": [""]}}, "adapters.use.0"),
        ({"adapters": {"use": ["a b"]}}, "adapters.use.0"),
        ({"adapters": {"uses": ["a"]}}, "adapters.uses"),
        ({"sources": ["http://x"]}, "sources"),
        ({"max_adapters": 0}, "max_adapters"),
        ({"max_merges": -1}, "max_merges"),
        ({"max_queue_share": 1.5}, "max_queue_share"),
        ({"max_queue_share": 0}, "max_queue_share"),
        ({"tokens": 1}, "tokens"),
    ],
)
def test_a_bad_scope_is_refused_with_the_place(scope: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Scope.model_validate(scope)

    assert ".".join(map(str, caught.value.errors()[0]["loc"])) == where


@pytest.mark.parametrize(
    ("scope", "problem"),
    [
        ({"burst_tokens": 10}, "give both"),
        ({"tokens_per_minute": 5, "guaranteed_tokens_per_minute": 6}, "more than tokens_per_min"),
    ],
)
def test_rates_that_contradict_each_other_are_refused(scope: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Scope(**scope)
