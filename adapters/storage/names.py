"""The names that an adapter may have."""

import re

from infuse.adapters.errors import Fault, InvalidAdapter

NAME_PATTERN = r"([A-Za-z0-9][A-Za-z0-9._-]{0,95}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""A name, or an owner and a name, as hubs write them."""
MAX_NAME = 96 + 1 + 128
_PARTS = ("files", "revisions", "rollback", "vectors")
"""What follows a name in paths of the API. So an adapter `owner/files` cannot be."""


def check_name(name: str) -> None:
    """Raises InvalidAdapter where `name` cannot be an adapter's."""
    shown = name if len(name) <= 140 else name[:137] + "..."
    if not re.fullmatch(NAME_PATTERN, name):
        problem = f"{shown!r} is no adapter name"
        fix = (
            "1 to 128 letters, digits, dots, underscores and hyphens; the first a letter or digit; "
            "before it there may be an owner and a slash, as in 'my-org/support-de'"
        )
        raise InvalidAdapter([Fault("name", problem, fix)])
    if name.partition("/")[2] in _PARTS:
        problem = f"{shown!r} cannot be told from the {name.partition('/')[2]} of an adapter"
        raise InvalidAdapter([Fault("name", problem, "take another name after the slash")])
