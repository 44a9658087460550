"""What may go wrong with a model, and whether it is a matter of memory."""

import re
import traceback
from dataclasses import dataclass
from typing import Self

import torch

FAULTS = (RuntimeError, ValueError, TypeError, MemoryError)
"""What a model, or a request in it, may raise. Anything else is a fault of ours, but for what
`is_foreign` knows."""
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|bad_alloc|ALLOC_FAILED"
)


class KeysLost(RuntimeError):
    """There was no memory for rows that come together anew: their keys and values are gone."""


def is_panic(error: BaseException) -> bool:
    """Whether a library's Rust code (tokenizers, llguidance, safetensors) has panicked: that is no
    Exception, and each library has a type of its own that cannot be imported."""
    return type(error).__name__ == "PanicException"


def is_foreign(error: BaseException) -> bool:
    """Whether a library has failed, and not an invariant of ours. Some raise bare Exceptions."""
    return isinstance(error, FAULTS) or type(error) is Exception or is_panic(error)


@dataclass(frozen=True, slots=True)
class Fault:
    """What is left of an exception: itself, it would hold on to the memory of its frames."""

    message: str
    trace: str
    no_memory: bool
    keys_lost: bool

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Raises the error again where it says that the device is lost: nothing runs on it then."""
        keys_lost = isinstance(error, KeysLost)
        origin = error.__cause__ or error if keys_lost else error
        known = isinstance(origin, torch.OutOfMemoryError | MemoryError)
        no_memory = known or _NO_MEMORY.search(str(origin)) is not None
        if isinstance(origin, torch.AcceleratorError) and not no_memory:
            raise error
        trace = "".join(traceback.format_exception(error))
        return cls(str(origin), trace, no_memory, keys_lost)

    @property
    def reason(self) -> str:
        """For the client of a request that failed alone."""
        if self.no_memory:
            return "There is not enough memory for this request, not even alone; shorten it."
        return f"The model failed: {self.message}"
