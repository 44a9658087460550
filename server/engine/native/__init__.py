"""Infuse's own engine: continuous batching over one base model with an adapter for each row.

`EngineCore` runs steps and `Engine` gives it a thread. Each folder is a part of a step.
"""

from infuse.server.engine.native.config import EngineConfig
from infuse.server.engine.native.engine import Engine
from infuse.server.engine.native.model.loading import LoadedModel, load_model

__all__ = ["Engine", "EngineConfig", "LoadedModel", "load_model"]
