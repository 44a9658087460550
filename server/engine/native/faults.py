"""Tells errors of a model or a library, above all a lack of memory, from bugs of our own."""

import re
import traceback
from dataclasses import dataclass
from typing import Self

import torch

from infuse.server.engine.panics import is_panic

FAULTS = (RuntimeError, ValueError, TypeError, MemoryError)
"""The errors that a model may raise, for all rows or for one. Others are bugs of ours, except for
those that `is_foreign` knows."""
_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can't allocate memory|bad_alloc|ALLOC_FAILED"
    # What oneDNN says of all that a checked model can lack.
    "|could not create a primitive$|could not create a memory object|could not execute a primitive"
)


class KeysLost(RuntimeError):
    """Memory ran out while rows were moved in the cache: their keys and values are lost."""


def is_foreign(error: BaseException) -> bool:
    """Whether a library failed, not an invariant of ours. Some libraries raise bare Exceptions."""
    return isinstance(error, FAULTS) or type(error) is Exception or is_panic(error)


@dataclass(frozen=True, slots=True)
class Fault:
    """The facts of an exception. The exception itself would keep its frames' tensors alive."""

    message: str
    trace: str
    no_memory: bool
    keys_lost: bool

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """Read an exception. If the device is lost, raise it again: nothing more runs on it."""
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
        """The error message for the client whose request failed alone."""
        if self.no_memory:
            return "There is not enough memory for this request, not even alone; shorten it."
        return f"The model failed: {self.message}"
