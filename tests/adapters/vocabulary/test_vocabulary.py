"""An adapter's tokenizer is the base's with tokens added, however written, or it is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infuse.adapters.checkpoint.targets import BaseModules
from infuse.adapters.errors import InvalidAdapter, SandboxUnavailable
from infuse.adapters.vocabulary import sandbox, vocabulary
from infuse.adapters.vocabulary.sandbox import Limits
from infuse.adapters.vocabulary.vocabulary import Vocabularies
from infuse.server.engine.model_files import default_model_folder
from tests.factories import byte_fallback_tokenizer, tiny_tokenizer

Plain = dict[str, Any]
BASES = {"byte-level": tiny_tokenizer, "byte-fallback": byte_fallback_tokenizer}


class NoEmbeddings(BaseModules):
    """A base without embeddings, so that added tokens need no rows."""

    input_embedding = None

    def __init__(self) -> None:
        pass


@pytest.fixture(scope="module", params=BASES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def vocabularies(kind: str) -> Iterator[Vocabularies]:
    vocabularies = Vocabularies(BASES[kind](), NoEmbeddings())
    yield vocabularies
    vocabularies.close()


@pytest.fixture
def base(kind: str) -> PreTrainedTokenizerFast:
    return BASES[kind]()


def added(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["<tool>", "ab", "naïve"])
    tokenizer.add_tokens(
        [AddedToken("<end>", special=True, lstrip=True), AddedToken("b", rstrip=True)]
    )


def marked(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|a|>", "<|b|>"], "sep_token": "|"}
    )


def another_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    tokenizer.eos_token = "<end>"


def begins(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_bos_token = True
    tokenizer.add_eos_token = True


def many(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens([f"<token {number}>" for number in range(3000)])


def padded(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.add_tokens(["<tool>"])
    tokenizer(
        ["a", "abc"],
        padding="longest" if tokenizer.pad_token else False,
        truncation=True,
        max_length=2,
    )


CHANGES = [added, marked, another_end, begins, many, padded]


def reloaded(folder: Path) -> None:
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def reserialised(folder: Path) -> None:
    path = folder / "tokenizer.json"
    Tokenizer.from_file(str(path)).save(str(path), pretty=False)


def written_by_an_older_library(folder: Path) -> None:
    """Write merges as single texts, no field of newer versions, and an empty text for null."""
    path = folder / "tokenizer.json"
    text = json.loads(path.read_text())
    model = text["model"]
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    for name in ("byte_fallback", "ignore_merges"):
        if not model[name]:
            del model[name]
    model["continuing_subword_prefix"] = ""
    path.write_text(json.dumps(text, indent=2))


def with_old_names(folder: Path) -> None:
    """Move the special tokens to a file of their own, as transformers 4 wrote them."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    specials = {key: config.pop(key) for key in list(config) if key.endswith("_token")}
    specials["additional_special_tokens"] = config.pop("extra_special_tokens", [])
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    path.write_text(json.dumps(config))


WAYS = [reloaded, reserialised, written_by_an_older_library, with_old_names]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_tokenizer_that_adds_to_the_bases_does_as_it_does_itself(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    change: Callable[[PreTrainedTokenizerFast], None],
    way: Callable[[Path], None],
) -> None:
    change(base)
    base.save_pretrained(tmp_path)
    way(tmp_path)
    found = vocabularies.read(tmp_path, {})

    assert found is not None
    assert found.tokenizer.get_vocab() == base.get_vocab()
    assert found.tokenizer.eos_token == base.eos_token
    for text in (
        "a ab b abc  <tool>x <end> <|a|>naïve | é\n😀",
        " <token 2999><token 1>",
        "<end>  b",
    ):
        for special in (True, False):
            ids = base.encode(text, add_special_tokens=special)
            assert found.tokenizer.encode(text, add_special_tokens=special) == ids
            assert found.tokenizer.decode(ids) == base.decode(ids)


@pytest.mark.parametrize("way", [reloaded, reserialised, written_by_an_older_library])
def test_the_bases_own_tokenizer_is_none_of_its_own(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    way: Callable[[Path], None],
) -> None:
    base.save_pretrained(tmp_path)
    way(tmp_path)

    assert vocabularies.read(tmp_path, {}) is None


@pytest.mark.real
@pytest.mark.parametrize("way", [reloaded, reserialised, written_by_an_older_library])
def test_the_default_models_tokenizer_with_tokens_added_is_served(
    tmp_path: Path, way: Callable[[Path], None]
) -> None:
    base = AutoTokenizer.from_pretrained(default_model_folder())
    with closing(Vocabularies(base, NoEmbeddings())) as vocabularies:
        tokenizer = AutoTokenizer.from_pretrained(default_model_folder())
        tokenizer.add_tokens(["<tool>", AddedToken("<end>", special=True)])
        tokenizer.save_pretrained(tmp_path)
        way(tmp_path)
        found = vocabularies.read(tmp_path, {})

    assert found is not None
    text = "It's 12 <tool> o'clock.<end>  \n\tdef f(x): 日本 😀"
    ids = tokenizer.encode(text)
    assert found.tokenizer.encode(text) == ids
    assert found.tokenizer.decode(ids) == tokenizer.decode(ids)


token = st.text(alphabet="ab <>|é▁Ġ\n", min_size=1, max_size=4)
flags = st.fixed_dictionaries(
    {name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tokens=st.lists(
        st.tuples(token, flags), min_size=1, max_size=5, unique_by=lambda each: each[0]
    ),
    texts=st.lists(st.text(alphabet="ab <>|é▁\n", max_size=12), max_size=8),
)
def test_whatever_tokens_are_added_texts_are_read_as_the_tokenizer_itself_does(
    vocabularies: Vocabularies,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    tokens: list[tuple[str, dict[str, bool]]],
    texts: list[str],
) -> None:
    tokenizer = BASES[kind]()
    tokenizer.add_tokens([AddedToken(content, **how) for content, how in tokens])
    folder = tmp_path_factory.mktemp("added")
    tokenizer.save_pretrained(folder)
    found = vocabularies.read(folder, {})
    read = tokenizer if found is None else found.tokenizer

    for text in texts:
        ids = tokenizer.encode(text)
        assert read.encode(text) == ids
        assert read.decode(ids) == tokenizer.decode(ids)


def replaces(text: Plain) -> None:
    replace = {"type": "Replace", "pattern": {"String": "never seen"}, "content": "X"}
    text["decoder"] = {"type": "Sequence", "decoders": [text["decoder"], replace]}


def panics(text: Plain) -> None:
    text["decoder"] = {"type": "Strip", "content": "a", "start": 0, "stop": 2}


def aborts(text: Plain) -> None:
    text["model"]["merges"] = [["nowhere", "x"]]


def fixes_length(text: Plain) -> None:
    text["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def precompiled(text: Plain) -> None:
    text["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}


def catastrophic(text: Plain) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a|aa|a*)*$b"}, "behavior": "Isolated"}
    text["pre_tokenizer"] = split | {"invert": False}


def multiplies(text: Plain) -> None:
    replace = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    text["normalizer"] = {"type": "Sequence", "normalizers": [replace] * 5}


def lowers(text: Plain) -> None:
    text["normalizer"] = {"type": "Lowercase"}


def merges(text: Plain) -> None:
    vocab = text["model"]["vocab"]
    vocab["ab"] = max(vocab.values()) + 1
    text["model"]["merges"] = [["a", "b"]]


def strange_token(text: Plain) -> None:
    text["model"]["vocab"]["strange"] = len(text["model"]["vocab"])


def endless_token(text: Plain) -> None:
    new = dict(text["added_tokens"][0]) if text["added_tokens"] else {"special": False}
    new |= {"id": len(text["model"]["vocab"]), "content": "x" * 2000, "normalized": False}
    text["added_tokens"].append({"single_word": False, "lstrip": False, "rstrip": False} | new)


def countless_tokens(text: Plain) -> None:
    first = len(text["model"]["vocab"])
    new = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    text["added_tokens"] += [
        new | {"id": first + n, "content": f"<{n}>", "normalized": False} for n in range(70_000)
    ]


def long_around(text: Plain) -> None:
    special = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    ids = {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, *[special] * 1000]
    text["post_processor"] = {"type": "TemplateProcessing", "single": parts, "pair": parts}
    text["post_processor"]["special_tokens"] = ids


REFUSED = [
    (replaces, "decodes 'never seen' otherwise"),
    (panics, "otherwise than the base's|is no tokenizer"),
    (aborts, "is no tokenizer"),
    (fixes_length, "is no tokenizer|otherwise"),
    (precompiled, "is no tokenizer|otherwise|takes more than"),
    (catastrophic, "is no tokenizer|otherwise|takes more than"),
    (multiplies, "is no tokenizer|otherwise|takes more than"),
    (lowers, "encodes 'The quick brown"),
    (merges, "tokens that are neither the base's nor added ones, such as 'ab'"),
    (strange_token, "such as 'strange'"),
    (endless_token, "adds a token of 2000 characters"),
    (countless_tokens, "adds more than 65536 tokens"),
    (long_around, "encodes"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSED)
def test_a_tokenizer_that_does_something_else_is_refused_with_what(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Plain], None],
    problem: str,
) -> None:
    monkeypatch.setattr(sandbox, "TOKENIZER", Limits(4, 30, 256 << 20))
    base.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "tokenizer.json").read_text())
    change(text)
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))

    for _ in range(2):
        with pytest.raises(InvalidAdapter, match=problem) as refusal:
            vocabularies.read(tmp_path, {})
        assert refusal.value.faults[0].field == "tokenizer.json"
        assert "add_tokens" in refusal.value.faults[0].fix


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"bos_token": 5}, "does not fit"),
        ({"bos_token": {"content": 5}}, "does not fit"),
        ({"extra_special_tokens": [[["x"]]]}, "does not fit"),
        ({"extra_special_tokens": "ab"}, "is no list of tokens"),
        ({"chat_template": ["x"]}, "that is no text"),
        ({"chat_template": "{{ (7 ** 90000000) > 1 }}"}, "takes more than"),
        ({"chat_template": "{% for %}"}, "cannot be compiled"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: Plain,
    problem: str,
) -> None:
    monkeypatch.setattr(sandbox, "TEMPLATE", Limits(1, 100, 128 << 20))
    base.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (tmp_path / "chat_template.jinja").unlink()

    with pytest.raises(InvalidAdapter, match=problem):
        vocabularies.read(tmp_path, {})


def test_a_refusal_is_remembered_and_not_tried_again(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InvalidAdapter) as first:
        vocabularies.find("digest", tmp_path, {})
    monkeypatch.setattr(vocabulary, "read_files", lambda _: {}["not again"])

    with pytest.raises(InvalidAdapter) as second:
        vocabularies.find("digest", tmp_path, {})
    assert first.value.faults == second.value.faults


def test_what_a_busy_machine_did_not_finish_is_tried_again(
    vocabularies: Vocabularies,
    base: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base.add_tokens(["<tried again>"])
    base.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "TOKENIZER", Limits(20, 0.001, 2 << 30))
        with pytest.raises(SandboxUnavailable):
            vocabularies.find("busy", tmp_path, {})

    found = vocabularies.find("busy", tmp_path, {})
    assert found is not None
    assert "<tried again>" in found.tokenizer.get_vocab()
