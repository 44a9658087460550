from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer
from tests.factories import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
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
