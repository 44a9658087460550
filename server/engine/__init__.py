"""The engine's protocol, and the values that it speaks: requests, outputs, stats and errors.

`native` is our own engine. The API knows this package and `constraints`, and no engine's inside.
"""

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
from server.engine.protocol import Engine, ServedModel
from server.engine.request import (
    FinishReason,
    GenerationRequest,
    Output,
    SamplingParams,
    TokenLogprob,
)
from server.engine.stats import EngineStats

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
]
