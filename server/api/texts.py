"""Checks texts before a tokenizer reads them."""


def check_text(text: str, where: str) -> str:
    """The text as it is. Raises ValueError for half a surrogate pair: JSON can carry one, UTF-8 and
    tokenizers cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has half of a surrogate pair as character {error.start}; send complete "
            "characters"
        ) from None
    return text
