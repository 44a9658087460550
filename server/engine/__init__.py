"""Tokens in, tokens out: continuous batching of rows that each use an adapter of their own."""

from server.engine.errors import (
    BadConstraint,
    ConstraintsUnavailable,
    DoesNotFit,
    EngineDead,
    EngineError,
    EngineStopping,
    ModelNotFound,
    QueueFull,
    UnsupportedModel,
)
from server.engine.native.config import EngineConfig, EngineStats
from server.engine.native.engine import Engine
from server.engine.native.model.loading import LoadedModel, load_model
from server.engine.request import (
    FinishReason,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "BadConstraint",
    "ConstraintsUnavailable",
    "DoesNotFit",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineError",
    "EngineStats",
    "EngineStopping",
    "FinishReason",
    "GenerationRequest",
    "LoadedModel",
    "ModelNotFound",
    "Output",
    "QueueFull",
    "SamplingParams",
    "TokenLogprob",
    "UnsupportedModel",
    "load_model",
]
