"""IA3 adapters: what a notebook imports from here.

Each name is loaded when it is first used, because torch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infuse.adapters.checkpoint.config import IA3Config as IA3Config
    from infuse.adapters.derive.combine import combine as combine
    from infuse.adapters.derive.merge import merge as merge
    from infuse.adapters.model.model import IA3Model as IA3Model
    from infuse.adapters.registry import AdapterRegistry as AdapterRegistry
    from infuse.adapters.storage.store import AdapterStore as AdapterStore

__all__ = ["AdapterRegistry", "AdapterStore", "IA3Config", "IA3Model", "combine", "merge"]
_MODULES = {
    "AdapterRegistry": "infuse.adapters.registry",
    "AdapterStore": "infuse.adapters.storage.store",
    "IA3Config": "infuse.adapters.checkpoint.config",
    "IA3Model": "infuse.adapters.model.model",
    "combine": "infuse.adapters.derive.combine",
    "merge": "infuse.adapters.derive.merge",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'infuse.adapters' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
