"""The engine's protocol, and its values: requests, outputs, stats and errors.

`native` is our own engine. The API imports this package and `constraints`, but never `native`.
"""

from infuse.server.engine.errors import (
    BadConstraint,
    ConstraintsUnavailable,
    DoesNotFit,
    EngineDead,
    EngineError,
    EngineStopping,
    ModelNotFound,
    QueueFull,
    UnsupportedModel,
    WaitTooLong,
)
from infuse.server.engine.protocol import Engine, ServedModel
from infuse.server.engine.request import (
    FinishReason,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
)
from infuse.server.engine.stats import EngineStats

__all__ = [
    "BadConstraint",
    "ConstraintsUnavailable",
    "DoesNotFit",
    "Engine",
    "EngineDead",
    "EngineError",
    "EngineStats",
    "EngineStopping",
    "FinishReason",
    "GenerationRequest",
    "ModelNotFound",
    "Output",
    "QueueFull",
    "SamplingParams",
    "ServedModel",
    "TokenLogprob",
    "UnsupportedModel",
    "WaitTooLong",
]
