"""The bytes and names of tokens, for tokenizers of both common kinds."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.api.logprobs import CompletionLogprobWriter, TokenBytes, chat_logprobs
from server.engine.request import TokenLogprob


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
