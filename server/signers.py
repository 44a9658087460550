"""The trusted signers of a server, where signatures can be verified."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from infuse.adapters.errors import SignersUnreadable


def signers_of(trusted: Path | None) -> Callable[[Path], str] | None:
    """Return what tells who has signed the files in a folder, or raises NotSigned; None where
    nobody is named. Raises SignersUnreadable."""
    return None if trusted is None else signatures().Signers(trusted).verify


def signatures() -> ModuleType:
    """The module that needs model-signing, which not every server has. It takes two seconds."""
    try:
        from infuse.adapters import signatures
    except ImportError as error:
        problem = f"{error}; pip install 'infuse-server[signing]'"
        raise SignersUnreadable(problem) from None
    return signatures
