"""How commands print what they did not write themselves."""

from infuse.server.commands.output import harmless, printable


def test_nothing_that_is_printed_moves_the_cursor() -> None:
    assert harmless("\x1b[2Ja\tb\r\nc\x9b") == "[2Ja\tb\nc"
    assert printable("\x1b[2Ja\nb") == "?[2Ja?b"


def test_an_answer_keeps_its_letters_in_every_script() -> None:
    family, persian = "\U0001f468\u200d\U0001f467", "می\u200cخواهم"

    assert harmless(family + persian) == family + persian
