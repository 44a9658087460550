"""The vocabularies of adapters used last stay in memory."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from infuse.adapters.vocabulary import vocabulary
from infuse.adapters.vocabulary.vocabulary import Vocabularies
from tests.adapters.vocabulary.test_vocabulary import NoEmbeddings
from tests.factories import tiny_tokenizer


@pytest.fixture
def vocabularies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vocabularies]:
    """Vocabularies of which two stay in memory."""
    monkeypatch.setattr(vocabulary, "MOST_KEPT", 2)
    with closing(Vocabularies(tiny_tokenizer(), NoEmbeddings())) as made:
        yield made


def save(folder: Path, token: str) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return folder


def test_the_tokenizers_used_last_stay_in_memory_and_others_are_read_again(
    vocabularies: Vocabularies, tmp_path: Path
) -> None:
    first, second, third = (save(tmp_path / f"{n}", f"<token {n}>") for n in range(3))
    found = [vocabularies.find(folder.name, folder, {}) for folder in (first, second)]
    assert all(found)
    leaves = weakref.ref(found[1].tokenizer)
    del found
    assert vocabularies.find(first.name, tmp_path / "not read", {}) is not None
    vocabularies.find(third.name, third, {})
    gc.collect()

    assert leaves() is None
    assert [vocabularies.knows(each.name) for each in (first, second, third)] == [True, False, True]
    again = vocabularies.find(second.name, second, {})
    assert again is not None
    assert "<token 1>" in again.tokenizer.get_vocab()


def test_adapters_with_equal_files_share_what_is_in_memory(
    vocabularies: Vocabularies, tmp_path: Path
) -> None:
    folder = save(tmp_path, "<token>")
    found = [vocabularies.find(f"digest {n}", folder, {}) for n in range(9)]

    assert len({id(each) for each in found}) == 1
    assert all(vocabularies.knows(f"digest {n}") for n in range(9))
