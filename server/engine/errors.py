"""The errors that the engine raises.

EngineError
├── ModelNotFound      the model that the settings name was not found
├── UnsupportedModel   this model cannot be run exactly; the message says which part
├── DoesNotFit         a setting asks for more memory than there is, or too little to work with
├── QueueFull          too many requests wait already; the message says when to try again
├── WaitTooLong        a request would wait too long in the queue; the message says how long
├── EngineStopping     the server is shutting down
├── BadConstraint      a grammar that is malformed, unsupported or too large; says where
├── ConstraintsUnavailable  the model's tokenizer cannot be constrained
└── EngineDead         the model has ended on an error, or hangs
"""

import math


class EngineError(Exception):
    """The base class of all errors that the engine raises on purpose."""


class ModelNotFound(EngineError):
    pass


class UnsupportedModel(EngineError):
    pass


class DoesNotFit(EngineError):
    pass


class QueueFull(EngineError):
    def __init__(self, waiting: int, retry_after: float) -> None:
        self.retry_after = max(1, math.ceil(retry_after))
        """Whole seconds until a request is likely to be admitted."""
        super().__init__(
            f"{waiting} requests are waiting already; try again in {self.retry_after} s."
        )


class WaitTooLong(EngineError):
    def __init__(self, wait: float, allowed: float, retry_after: float) -> None:
        self.retry_after = max(1, math.ceil(retry_after))
        """Whole seconds until a request is likely to wait no longer than it can."""
        super().__init__(
            f"The request would wait about {math.ceil(wait)} s in the queue, and has "
            f"{max(0.0, allowed):.3g} s for it; try again in {self.retry_after} s."
        )


class EngineStopping(EngineError):
    def __init__(self) -> None:
        super().__init__("The server is shutting down and takes no new requests.")


class BadConstraint(EngineError):
    def __init__(self, where: str, problem: str, fix: str) -> None:
        self.where = where
        """The field that holds the grammar."""
        super().__init__(f"{where} {problem}; {fix}.")


class ConstraintsUnavailable(EngineError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"Answers of this model cannot be constrained: {reason}")


class EngineDead(EngineError):
    def __init__(self) -> None:
        super().__init__("The model has ended on an error, or hangs; the server must be restarted.")
