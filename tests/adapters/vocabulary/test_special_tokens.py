"""The special tokens that the files of an adapter's tokenizer name."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from infuse.adapters.errors import InvalidAdapter
from infuse.adapters.vocabulary import vocabulary
from infuse.adapters.vocabulary.vocabulary import Vocabularies
from tests.adapters.vocabulary.test_vocabulary import BASES, NoEmbeddings, Plain, many


@pytest.fixture(scope="module", params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def vocabularies(kind: str) -> Iterator[Vocabularies]:
    with closing(Vocabularies(BASES[kind](), NoEmbeddings())) as made:
        yield made


@pytest.fixture
def base(kind: str) -> PreTrainedTokenizerFast:
    return BASES[kind]()


@pytest.mark.parametrize("named", [{}, {"image_token": "<image>", "audio_token": "<audio>"}])
def test_special_tokens_that_have_names_of_their_own_are_read(
    vocabularies: Vocabularies, base: PreTrainedTokenizerFast, tmp_path: Path, named: Plain
) -> None:
    """transformers 4.46 to 4.57 wrote such names, beside tokens without any."""
    base.add_tokens(["<image>", "<audio>", "<|a|>"], special_tokens=True)
    base.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"extra_special_tokens": named, "additional_special_tokens": ["<|a|>"]}
    path.write_text(json.dumps(config))
    found = vocabularies.read(tmp_path, {})

    assert found is not None
    assert found.tokenizer.extra_special_tokens == [*named.values(), "<|a|>"]
    ids = base.encode("a<image>b<|a|>")
    assert found.tokenizer.encode("a<image>b<|a|>") == ids


@pytest.mark.parametrize("field", ["extra_special_tokens", "additional_special_tokens"])
@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([f"<token {number}>" for number in range(1001)], "more than 1000 special tokens"),
        (["<token 1>", "<unheard of>"], "'<unheard of>', which tokenizer.json has no token for"),
    ],
    ids=["many", "unknown"],
)
def test_special_tokens_that_are_too_many_or_unknown_are_refused_before_they_are_added(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    names: list[str],
    problem: str,
) -> None:
    many(base)
    base.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: names}))
    monkeypatch.setattr(vocabulary, "PreTrainedTokenizerFast", None)

    with pytest.raises(InvalidAdapter, match=problem) as refusal:
        vocabularies.read(tmp_path, {})
    assert [fault.field for fault in refusal.value.faults] == ["tokenizer_config.json"]
