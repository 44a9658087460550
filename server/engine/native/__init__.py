"""Our own engine, for CPUs, notebooks and encoder-decoders: `EngineCore` is one synchronous object,
`Engine` its thread, and each room below is one part of a step."""

from server.engine.native.config import EngineConfig
from server.engine.native.engine import Engine
from server.engine.native.model.loading import LoadedModel, load_model

__all__ = ["Engine", "EngineConfig", "LoadedModel", "load_model"]
