"""Recognises the tokens of tokenizers with byte fallback that stand for one byte, as `<0x41>`."""

import re

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_of(name: str) -> bytes | None:
    """The byte that a token with this name stands for. None: it stands for text."""
    found = _BYTE.fullmatch(name)
    return None if found is None else bytes.fromhex(found[1])
