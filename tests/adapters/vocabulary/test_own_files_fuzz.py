"""Mutated tokenizers and chat templates end in time, and harm no other request."""

import json
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from infuse.adapters.errors import InvalidAdapter, TemplateRefused
from infuse.adapters.vocabulary import sandbox
from infuse.adapters.vocabulary.sandbox import Limits
from infuse.adapters.vocabulary.vocabulary import Vocabularies
from infuse.server.engine.detokenizer import Detokenizer
from tests.adapters.vocabulary.test_sandbox import RUNAWAYS
from tests.adapters.vocabulary.test_vocabulary import NoEmbeddings
from tests.chat_templates import HERMES, LLAMA, MISTRAL
from tests.factories import CHAT_TEMPLATE, byte_fallback_tokenizer, tiny_tokenizer

LIMITS = Limits(1, 20, 192 << 20)
FEW = 240
MANY = 10_000
TEXT = "a ab <|user|>é\n😀 b"
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]
STEPS: list[dict[str, Any]] = [
    {"type": "Strip", "content": "a", "start": 0, "stop": 2},
    {"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": "aa"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 500},
    {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
    {"type": "FixedLength", "length": 0},
    {"type": "Split", "pattern": {"Regex": "^(a|aa)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Fuse"},
    {"type": "ByteFallback"},
    {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "Prepend", "prepend": "▁"},
]
VALUES = [None, True, -1, 0, 1, 2**31, 2**64, 1e308, "", "a", "\ud800", "é" * 300, [], {}, [[]]]
PIECES = [
    "{{ 1 / 0 }}",
    "{{ messages | tojson }}",
    "{{ raise_exception('no') }}",
    "{% for a in range(9999) %}x{% endfor %}",
    "{% include 'x' %}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].environ }}",
    "{{ namespace(a=1) }}",
    "{{ '%s' % messages }}{{ '{0.__class__}'.format(1) }}",
    "{% set messages = messages + messages %}",
]


def mutate(value: Any, draw: random.Random) -> Any:
    """Change one value inside a JSON value, remove it, or repeat it."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        changed = {**value, key: mutate(value[key], draw)}
        if draw.random() < 0.1:
            del changed[key]
        return changed
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        inner = [mutate(value[at], draw)] * draw.choice([0, 1, 1, 2])
        return [*value[:at], *inner, *value[at + 1 :]]
    return draw.choice([*VALUES, *STEPS])


def mutated_tokenizer(text: str, draw: random.Random) -> str:
    value = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        step = draw.choice(["normalizer", "pre_tokenizer", "decoder", "post_processor"])
        kind = draw.random()
        if kind < 0.3:
            value[step] = draw.choice(STEPS)
        elif kind < 0.5:
            inner = [each for each in (value.get(step), draw.choice(STEPS)) if each]
            name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}
            value[step] = {"type": "Sequence", name.get(step, "decoders"): inner}
        else:
            part = draw.choice(list(value))
            value[part] = mutate(value[part], draw)
    written = json.dumps(value)
    if draw.random() < 0.1:
        at = draw.randrange(len(written))
        written = written[:at] + chr(draw.randrange(32, 127)) + written[at + draw.randint(0, 9) :]
    return written


def mutated_template(template: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 3)):
        at, end = sorted(draw.randrange(len(template) + 1) for _ in range(2))
        piece = draw.choice(PIECES if draw.random() < 0.9 else list(RUNAWAYS.values()))
        middle = draw.choice([piece, template[at:end] * 2, "", "{%", "}}", "é"])
        end = at if draw.random() < 0.5 else min(end, at + 8)
        template = template[:at] + middle + template[end:]
    return template


@pytest.fixture(scope="module", params=[tiny_tokenizer, byte_fallback_tokenizer])
def base(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = request.param()
    return tokenizer


@pytest.fixture(scope="module")
def vocabularies(base: PreTrainedTokenizerFast) -> Iterator[Vocabularies]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "TOKENIZER", LIMITS)
        patch.setattr(sandbox, "TEMPLATE", LIMITS)
        vocabularies = Vocabularies(base, NoEmbeddings())
        yield vocabularies
        vocabularies.close()


def try_all(
    base: PreTrainedTokenizerFast, vocabularies: Vocabularies, folder: Path, cases: int, seed: int
) -> None:
    text = base.backend_tokenizer.to_str()
    expected = base.encode(TEXT)
    draw = random.Random(seed)
    outcomes = {"served": 0, "refused": 0}
    for number in range(cases):
        mine = folder / str(number)
        mine.mkdir()
        if number % 2:
            (mine / "tokenizer.json").write_text(mutated_tokenizer(text, draw))
        else:
            template = draw.choice([CHAT_TEMPLATE, HERMES, MISTRAL, LLAMA])
            changed = mutated_template(template, draw)
            (mine / "chat_template.jinja").write_text(changed, errors="replace")
        began = time.monotonic()
        outcomes[_try(vocabularies, mine)] += 1
        assert time.monotonic() - began < 2 * (LIMITS.wall_seconds + 5)
        assert base.encode(TEXT) == expected
        assert base.decode(expected)
    assert all(outcomes.values()), outcomes


def _try(vocabularies: Vocabularies, folder: Path) -> str:
    """Read mutated files, and use those that are accepted on a text and a conversation."""
    try:
        found = vocabularies.read(folder, {})
    except InvalidAdapter:
        return "refused"
    if found is None:
        return "served"
    ids = found.tokenizer.encode(TEXT)
    detokenizer = Detokenizer(found.tokenizer, ids, (), skip_special_tokens=True)
    "".join(detokenizer.push(token)[0] for token in ids) + detokenizer.finish()
    try:
        found.render(MESSAGES, None)
    except TemplateRefused:
        return "refused"
    return "served"


def check(
    base: PreTrainedTokenizerFast,
    vocabularies: Vocabularies,
    new_folder: Callable[[str], Path],
    cases: int,
    threads: int,
    record_property: Callable[[str, object], None],
) -> None:
    with ThreadPoolExecutor(threads) as pool:
        runs = [
            pool.submit(try_all, base, vocabularies, new_folder("fuzz"), cases // threads, seed)
            for seed in range(threads)
        ]
        for run in runs:
            run.result()
    children = psutil.Process().children(recursive=True)
    assert not any(child.status() == psutil.STATUS_ZOMBIE for child in children)
    record_property("cases", cases)


def test_hundreds_of_mutated_files_harm_no_other_request(
    base: PreTrainedTokenizerFast,
    vocabularies: Vocabularies,
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Callable[[str, object], None],
) -> None:
    check(base, vocabularies, tmp_path_factory.mktemp, FEW // 2, 2, record_property)


@pytest.mark.full
def test_thousands_of_mutated_files_harm_no_other_request(
    base: PreTrainedTokenizerFast,
    vocabularies: Vocabularies,
    tmp_path_factory: pytest.TempPathFactory,
    record_property: Callable[[str, object], None],
) -> None:
    check(base, vocabularies, tmp_path_factory.mktemp, MANY // 2, 4, record_property)
