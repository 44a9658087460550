"""Which URLs name an adapter, and which of them the allowed prefixes allow."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infuse.adapters.errors import BadSource
from infuse.adapters.sources.source_url import Source, parse_prefixes, parse_source

PLACES = {
    "hf://org/name": Source("hf", ("org", "name")),
    "hf://org/name@main": Source("hf", ("org", "name"), "main"),
    "hf://org/name@v1.0/a/b": Source("hf", ("org", "name", "a", "b"), "v1.0"),
    "s3://bucket": Source("s3", ("bucket",)),
    "s3://bucket/a/b/": Source("s3", ("bucket", "a", "b")),
    "gs://my_bucket/a b": Source("gs", ("my_bucket", "a b")),
    "az://container/é": Source("az", ("container", "é")),
    "file:///srv/adapters/a@1": Source("file", ("srv", "adapters", "a@1")),
}


@pytest.mark.parametrize(("url", "source"), PLACES.items())
def test_a_place_is_read_and_written_back(url: str, source: Source) -> None:
    assert parse_source(url) == source
    assert str(source) == url.removesuffix("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "org/name",
        "hub",
        "http://example.org/a",
        "https://huggingface.co/org/name",
        "HF://org/name",
        "hf://",
        "hf://org",
        "hf://org/",
        "hf://org//name",
        "hf://org/name@",
        "hf://org/name@a b",
        "hf://org/name@refs%2Fpr%2F1",
        "hf://org/na me",
        "hf://org/../name",
        "hf://datasets/name",
        "hf://api/models",
        "hf://user:password@host/name",
        "s3://",
        "s3:///key",
        "s3://key:secret@bucket/a",
        "s3://Bucket/a",
        "s3://b/a",
        "s3://bucket:9000/a",
        "s3://bucket/a//b",
        "s3://bucket/a/../b",
        "s3://bucket/./a",
        "s3://bucket/a/..",
        "s3://bucket/%2e%2e/a",
        "s3://bucket/a?versionId=1",
        "s3://bucket/a#b",
        "s3://bucket/a\\..\\b",
        "s3://bucket/a\nb",
        "s3://bucket/a\x00",
        "s3://bucket/\u202ea",
        "file://",
        "file://localhost/a",
        "file://a/b",
        "file:///",
        "file:///a/../b",
        "file:///a/%2e%2e/b",
    ],
)
def test_what_could_be_read_in_two_ways_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(BadSource) as refusal:
        parse_source(url)

    assert "password" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


def allowed(prefixes: str, url: str) -> bool:
    source = parse_source(url)
    return any(prefix.holds(source) for prefix in parse_prefixes(prefixes))


@pytest.mark.parametrize(
    ("prefixes", "url"),
    [
        ("hf://", "hf://org/name"),
        ("hf://org", "hf://org/name@main"),
        ("hf://org/", "hf://org/name/folder"),
        ("hf://org/name", "hf://org/name"),
        ("s3://, hf://org/", "hf://org/name"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("s3://bucket/a/", "s3://bucket/a/b"),
        ("file:///srv", "file:///srv/a"),
        ("file:///", "file:///srv/a"),
    ],
)
def test_what_begins_with_an_allowed_prefix_is_allowed(prefixes: str, url: str) -> None:
    assert allowed(prefixes, url)


@pytest.mark.parametrize(
    ("prefixes", "url"),
    [
        ("", "hf://org/name"),
        (" , ", "file:///srv/a"),
        ("hf://org/", "hf://organisation/name"),
        ("hf://org/name", "hf://org/name2"),
        ("hf://org/", "hf://Org/name"),
        ("s3://bucket/a", "s3://bucket/ab"),
        ("s3://bucket/a", "s3://bucket"),
        ("s3://", "gs://bucket/a"),
        ("file:///srv", "file:///srv2/a"),
    ],
)
def test_nothing_else_is(prefixes: str, url: str) -> None:
    assert not allowed(prefixes, url)


@pytest.mark.parametrize(
    "prefixes", ["org/", "http://a/", "hf://org/name@main", "s3://a:b@bucket", "file:///a/../b"]
)
def test_an_allow_list_has_the_same_grammar(prefixes: str) -> None:
    with pytest.raises(BadSource):
        parse_prefixes(f"hf://org/,{prefixes}")


folders = st.lists(st.text("ab.% ", max_size=3), max_size=4)


@given(folders, folders)
def test_a_prefix_allows_what_lies_below_it_and_nothing_else(
    prefix: list[str], other: list[str]
) -> None:
    """An allowed URL is the prefix itself, or goes on after a slash."""
    try:
        [allowing] = parse_prefixes("s3://bucket/" + "/".join(prefix))
        source = parse_source("s3://bucket/" + "/".join(other))
    except (BadSource, ValueError):
        return
    below = str(source) == str(allowing) or str(source).startswith(f"{allowing}/")
    assert allowing.holds(source) == below
    assert allowing.holds(allowing)
