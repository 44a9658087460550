"""IA3 adapters: what a notebook imports. It is loaded on first use: torch takes seconds."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.checkpoint.config import IA3Config as IA3Config
    from adapters.model.model import IA3Model as IA3Model

__all__ = ["IA3Config", "IA3Model"]
_ROOMS = {"IA3Config": "adapters.checkpoint.config", "IA3Model": "adapters.model.model"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
