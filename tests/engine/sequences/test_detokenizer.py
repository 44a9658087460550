from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from infuse.server.engine.detokenizer import Detokenizer
from tests.factories import byte_fallback_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FALLBACK = byte_fallback_tokenizer()
BROKEN = "\ufffd"
texts = st.text(alphabet="ab\n é€😀", max_size=20)
stops = st.lists(st.text(alphabet="ab\n é", min_size=1, max_size=4), max_size=3)


def pieces(text: str, stop: Sequence[str] = (), prompt: Sequence[int] = (5,)) -> list[str]:
    """What each token of `text` released, up to a stop string, and what `finish` did."""
    detokenizer = Detokenizer(TOKENIZER, prompt, stop, skip_special_tokens=True)
    released = []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        piece, stopped = detokenizer.push(token)
        released.append(piece)
        if stopped:
            break
    return [*released, detokenizer.finish()]


def cut(text: str, stop: Sequence[str]) -> str:
    """The text when whole characters come one by one and a complete stop string ends it."""
    for end in range(len(text) + 1):
        found = [text.find(each, 0, end) for each in stop if each in text[:end]]
        if found:
            return text[: min(found)]
    return text


@given(texts)
def test_the_pieces_join_to_the_text_and_hold_whole_characters(text: str) -> None:
    assert "".join(pieces(text)) == text
    assert not any("�" in piece for piece in pieces(text))


@given(texts, stops)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    assert "".join(pieces(text, stop)) == cut(text, stop)


@given(texts, stops)
def test_no_piece_ever_has_to_be_taken_back(text: str, stop: list[str]) -> None:
    released = ""
    for piece in pieces(text, stop):
        released += piece
        assert cut(text, stop).startswith(released)


def test_text_that_cannot_become_a_stop_string_is_not_held() -> None:
    assert pieces("abxy", ["ab!"]) == ["", "", "abx", "y", ""]


def test_what_came_up_before_it_may_stop_is_never_taken_for_a_stop_string() -> None:
    for stop, expected in (("aa", "a"), ("ab", "aa"), ("abc", "aa"), ("aab", "a")):
        detokenizer = Detokenizer(TOKENIZER, (5,), (stop, "abcd"), skip_special_tokens=True)
        released, stopped = "", False
        for number, token in enumerate(TOKENIZER.encode("aaabcab"), start=1):
            piece, stopped = detokenizer.push(token, number > 2)
            released += piece
            if stopped:
                break
        assert (released, stopped, detokenizer.stopped_by) == (expected, True, stop)


def test_a_held_stop_string_is_passed_where_it_could_not_stop() -> None:
    detokenizer = Detokenizer(TOKENIZER, (5,), ("b", "abc"), skip_special_tokens=True)
    first, second, third = TOKENIZER.encode("abx")

    assert detokenizer.push(first, False) == ("", False)
    assert detokenizer.push(second, False) == ("", False)
    assert detokenizer.push(third) == ("abx", False)


@given(texts, stops)
def test_an_included_stop_string_is_the_texts_end(text: str, stop: list[str]) -> None:
    detokenizer = Detokenizer(TOKENIZER, (5,), stop, True, include_stop=True)
    released, stopped = "", False
    for token in TOKENIZER.encode(text):
        piece, stopped = detokenizer.push(token)
        released += piece
        if stopped:
            break
    if stopped:
        assert detokenizer.stopped_by in stop
        assert released == cut(text, stop) + detokenizer.stopped_by
    else:
        assert released + detokenizer.finish() == text


def test_a_character_cut_off_by_the_end_is_marked() -> None:
    detokenizer = Detokenizer(TOKENIZER, (5,), (), skip_special_tokens=True)
    first_byte_of_euro = TOKENIZER.encode("€", add_special_tokens=False)[0]

    assert detokenizer.push(first_byte_of_euro) == ("", False)
    assert detokenizer.finish() == "�"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    end = TOKENIZER.eos_token_id
    for skip, text in ((True, ""), (False, "</s>")):
        detokenizer = Detokenizer(TOKENIZER, (5,), (), skip_special_tokens=skip)
        assert detokenizer.push(end)[0] + detokenizer.finish() == text


def test_an_empty_stop_string_stops_nothing() -> None:
    assert "".join(pieces("abc", [""])) == "abc"


def after(
    tokenizer: PreTrainedTokenizerFast,
    prompt: Sequence[int],
    answer: Sequence[int],
    stop: Sequence[str] = (),
    skip_special_tokens: bool = True,
) -> str:
    """The answer's text, from its pieces."""
    detokenizer = Detokenizer(tokenizer, prompt, stop, skip_special_tokens)
    text = ""
    for token in answer:
        piece, stopped = detokenizer.push(token)
        text += piece
        if stopped:
            return text
    return text + detokenizer.finish()


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def halves(tokenizer: PreTrainedTokenizerFast, letters: str = "ab €é😀\n�") -> st.SearchStrategy:
    """Tokens of texts, halves of characters and special tokens among them."""
    tokens = [token for letter in letters for token in ids(tokenizer, letter)] + [1, 2]
    run = st.one_of(
        st.lists(st.sampled_from(tokens), max_size=6),
        st.text(alphabet=letters, max_size=4).map(lambda text: ids(tokenizer, text)),
    )
    return st.lists(run, max_size=5).map(lambda runs: [token for run in runs for token in run])


@given(halves(TOKENIZER), halves(TOKENIZER), st.booleans())
@example(ids(TOKENIZER, "prompt �"), ids(TOKENIZER, "answer"), True)
@example(ids(TOKENIZER, "prompt €")[:-1], ids(TOKENIZER, "answer"), True)
@example(ids(TOKENIZER, "prompt €")[:-1], ids(TOKENIZER, "€")[-1:], True)
@example(ids(TOKENIZER, "x"), ids(TOKENIZER, "�" * 40), True)
@example(ids(TOKENIZER, "x"), [*ids(TOKENIZER, "€")[:1], *[2] * 40, *ids(TOKENIZER, "€")[1:]], True)
def test_the_answer_is_what_it_adds_to_the_prompts_text(
    prompt: list[int], answer: list[int], skip: bool
) -> None:
    before = TOKENIZER.backend_tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = TOKENIZER.backend_tokenizer.decode(prompt + answer, skip_special_tokens=skip)
    if not whole.startswith(before):
        # The answer completes the prompt's last character.
        before = before.removesuffix(BROKEN)

    assert whole.startswith(before)
    assert after(TOKENIZER, prompt, answer, (), skip) == whole.removeprefix(before)


@given(halves(FALLBACK, "ab €é😀\n"), halves(FALLBACK, "ab €é😀\n"), st.booleans())
@example(ids(FALLBACK, "a"), ids(FALLBACK, "€")[:-1] + ids(FALLBACK, " b"), True)
@example(ids(FALLBACK, "a"), ids(FALLBACK, "€") + ids(FALLBACK, "€")[:1] + ids(FALLBACK, "b"), True)
@example(ids(FALLBACK, "€€€€"), ids(FALLBACK, "€€"), True)
@example(ids(FALLBACK, "a€")[:-1], ids(FALLBACK, "€")[-1:], True)
def test_with_byte_fallback_no_valid_text_is_lost_or_repeated(
    prompt: list[int], answer: list[int], skip: bool
) -> None:
    text = after(FALLBACK, [*ids(FALLBACK, "."), *prompt], answer, (), skip)

    assert text.replace(BROKEN, "") == valid(prompt + answer, skip).removeprefix(
        valid(prompt, skip)
    )
    decoded = FALLBACK.backend_tokenizer.decode(answer, skip_special_tokens=skip)
    if BROKEN not in decoded + FALLBACK.decode(prompt):
        assert text.lstrip(" ") == decoded.lstrip(" ")


def valid(tokens: Sequence[int], skip: bool) -> str:
    """The whole characters among the tokens' bytes."""
    data = b""
    for token in tokens:
        name = FALLBACK.convert_ids_to_tokens(token)
        special = token in FALLBACK.all_special_ids
        if name.startswith("<0x"):
            data += bytes([int(name[3:5], 16)])
        elif not (special and skip):
            data += name.replace("▁", " ").encode()
    return data.decode(errors="ignore")


def test_a_broken_character_in_the_prompt_repeats_none_of_it_and_stops_nothing() -> None:
    prompt = ids(TOKENIZER, "line\nsymbol �")

    assert after(TOKENIZER, prompt, ids(TOKENIZER, "abc\nd"), ["\n"]) == "abc"
    assert after(TOKENIZER, prompt, ids(TOKENIZER, "yes"), ["symbol"]) == "yes"


def replacing_tokenizer() -> PreTrainedTokenizerFast:
    """A decoder that changes what it has said already: two words of three are one."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_text_that_a_decoder_would_take_back_stays_and_goes_on() -> None:
    assert after(replacing_tokenizer(), [2], [0, 1, 2, 2, 0, 1]) == "abccab"


def panicking_tokenizer() -> PreTrainedTokenizerFast:
    """Its decoder panics at one letter: it strips more of it than there is."""
    tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="b"))
    tokenizer.decoder = decoders.Strip("a", 0, 2)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_what_cannot_be_decoded_is_said_and_the_rest_is_text() -> None:
    tokenizer = panicking_tokenizer()

    assert after(tokenizer, [2, 0], [1, 2]) == "bc"
    with pytest.raises(RuntimeError, match="cannot decode the token 0"):
        after(tokenizer, [1], [0])


def test_a_long_run_of_broken_characters_is_released_on_the_way() -> None:
    detokenizer = Detokenizer(TOKENIZER, (5,), (), skip_special_tokens=True)
    first_byte = ids(TOKENIZER, "€")[0]
    released = "".join(detokenizer.push(first_byte)[0] for _ in range(200))

    assert 150 < len(released) < 200
    assert released + detokenizer.finish() == BROKEN * 200
