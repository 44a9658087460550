"""The bytes and names of tokens, for tokenizers of both common kinds."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from infuse.server.api.logprobs import CompletionLogprobWriter, TokenBytes, chat_logprobs
from infuse.server.engine.request import TokenLogprob
from tests.factories import tiny_tokenizer


@pytest.fixture(scope="module")
def byte_level(model_folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def sentence_piece() -> PreTrainedTokenizerFast:
    """As llama 2 writes tokens: `▁` for a space, `<0xE2>` for a byte."""
    vocab = {"<unk>": 0, "</s>": 1, "▁Paris": 2, ".": 3, "<0xC3>": 4, "<0xB1>": 5, "▁": 6}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_every_byte_has_its_token(byte_level: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(byte_level)

    text = "Größe: 5 €\n\t"
    ids = byte_level.encode(text)

    assert b"".join(token_bytes[token] for token in ids) == text.encode()
    assert {token_bytes[token] for token in range(5, 261)} == {bytes([b]) for b in range(256)}
    assert token_bytes[2] == b"</s>"


def test_a_sentence_piece_keeps_its_leading_space(sentence_piece: PreTrainedTokenizerFast) -> None:
    token_bytes = TokenBytes(sentence_piece)

    assert [token_bytes[token] for token in (2, 3, 4, 5, 6)] == [
        b" Paris",
        b".",
        b"\xc3",
        b"\xb1",
        b" ",
    ]


def test_a_token_that_only_looks_like_a_byte_is_text() -> None:
    vocab = {"<unk>": 0, "</s>": 1, "<0xZZ>": 2, "<0x  >": 3, "<0x41>": 4}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.decoder = decoders.ByteFallback()
    token_bytes = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=tokenizer))

    assert [token_bytes[token] for token in (2, 3, 4)] == [b"<0xZZ>", b"<0x  >", b"A"]


def test_a_token_beyond_the_vocabulary_has_no_bytes(
    sentence_piece: PreTrainedTokenizerFast,
) -> None:
    assert TokenBytes(sentence_piece)[7] == b""


def test_tokens_of_equal_text_report_the_likeliest(sentence_piece: PreTrainedTokenizerFast) -> None:
    writer = CompletionLogprobWriter(TokenBytes(sentence_piece), skip_special_tokens=True)

    writer.write([(7, TokenLogprob(7, -3.0, top=((8, -1.0), (2, -2.0))))])

    assert writer.take().top_logprobs == [{"": -1.0, " Paris": -2.0}]


def test_special_tokens_take_no_room_in_the_text(sentence_piece: PreTrainedTokenizerFast) -> None:
    skipping = CompletionLogprobWriter(TokenBytes(sentence_piece), skip_special_tokens=True)
    showing = CompletionLogprobWriter(TokenBytes(sentence_piece), skip_special_tokens=False)

    for writer in (skipping, showing):
        writer.write([(token, None) for token in (1, 2, 3)])

    assert skipping.take().text_offset == [0, 0, 6]
    assert showing.take().text_offset == [0, 4, 10]


def test_offsets_go_on_from_part_to_part(sentence_piece: PreTrainedTokenizerFast) -> None:
    writer = CompletionLogprobWriter(TokenBytes(sentence_piece), skip_special_tokens=True)

    writer.write([(2, None), (4, None)])
    first = writer.take()
    writer.write([(5, None), (3, None)])
    second = writer.take()

    assert (first.text_offset, second.text_offset) == ([0, 6], [6, 7])


def test_an_impossible_token_has_a_finite_score(sentence_piece: PreTrainedTokenizerFast) -> None:
    scored = TokenLogprob(2, -0.5, top=((3, float("-inf")),))

    [token] = chat_logprobs(TokenBytes(sentence_piece), [scored]).content

    assert (token.token, token.bytes, token.logprob) == (" Paris", list(b" Paris"), -0.5)
    assert token.top_logprobs[0].logprob == -9999.0


def offsets(writer: CompletionLogprobWriter, tokens: list[int]) -> list[int]:
    writer.write([(token, None) for token in tokens])
    return writer.take().text_offset


def test_a_prompts_special_tokens_take_room_where_its_text_has_them(
    byte_level: PreTrainedTokenizerFast,
) -> None:
    for skips in (False, True):
        writer = CompletionLogprobWriter(TokenBytes(byte_level), skip_special_tokens=skips)
        ids = byte_level.encode("a</s>b")

        writer.begin_prompt("a</s>b")
        assert offsets(writer, ids) == [0, 1, 5]
        writer.begin_prompt("a</s>b")
        assert offsets(writer, [1, *ids, 2]) == [0, 0, 1, 5, 6]
        writer.begin_prompt("<s>a")
        assert offsets(writer, [1, 1, ids[0]]) == [0, 3, 3]


def test_the_blank_that_a_tokenizer_puts_first_takes_no_room(
    sentence_piece: PreTrainedTokenizerFast,
) -> None:
    writer = CompletionLogprobWriter(TokenBytes(sentence_piece), skip_special_tokens=True)

    writer.begin_prompt("Paris. Paris")
    assert offsets(writer, [2, 3, 2]) == [0, 5, 6]


def test_blanks_that_a_special_token_swallows_are_passed_over() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<m>", lstrip=True, rstrip=True, special=True)])
    writer = CompletionLogprobWriter(TokenBytes(tokenizer), skip_special_tokens=True)

    writer.begin_prompt("a  <m> b")
    assert offsets(writer, tokenizer.encode("a  <m> b")) == [0, 3, 7]


def test_an_added_token_is_special_as_decoders_know_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<r>", special=True), AddedToken("<n>", special=False)])
    token_bytes = TokenBytes(tokenizer)

    assert [token_bytes.is_special(token) for token in (2, 261, 262)] == [True, True, False]


PIECES = ["a", " b", "é", "€", "<s>", "</s>", "<|user|>", "\n", "😀"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8),
    as_ids=st.booleans(),
    skips=st.booleans(),
    tokens=st.integers(0, 12),
)
def test_a_text_has_each_token_where_its_offset_says(
    client: httpx.Client, pieces: list[str], as_ids: bool, skips: bool, tokens: int
) -> None:
    """With echo, for texts and ids, special tokens shown or not, in the prompt and the answer."""
    text = "".join(pieces)
    prompt: Any = tiny_tokenizer().encode(text) if as_ids else text
    special = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"]
    body = {
        "model": "tiny",
        "prompt": prompt,
        "echo": True,
        "logprobs": 0,
        "max_tokens": tokens,
        "seed": len(text),
        "ignore_eos": True,
        "skip_special_tokens": skips,
        "logit_bias": {str(token): 3 for token in range(5)},
    }
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    written = choice["logprobs"]
    placed = list(zip(written["text_offset"], written["tokens"], strict=True))

    assert choice["text"].startswith(text)
    for at, (offset, token) in enumerate(placed):
        hidden = token in special and skips and at >= len(placed) - tokens
        if not token.startswith("bytes:") and not hidden:
            assert choice["text"].startswith(token, offset), (offset, token)
    assert placed == sorted(placed, key=lambda each: each[0])
