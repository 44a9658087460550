"""What compilations have brought, kept for those who ask for the same: bounded, and fair."""

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.engine.constraints.vetting import GrammarKind

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Key:
    scope: str
    """Only requests of one scope share: the time that a hit saves tells what others have asked."""
    kind: GrammarKind
    digest: bytes


class Latest(Generic[_T]):
    """The latest results, a bounded number: of the scope that has most, the one unused longest
    goes. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._results: dict[Key, _T] = {}
        """The one used last stands last."""

    def get(self, key: Key) -> _T | None:
        with self._lock:
            result = self._results.pop(key, None)
            if result is not None:
                self._results[key] = result
            return result

    def put(self, key: Key, result: _T) -> None:
        with self._lock:
            self._results[key] = result
            if len(self._results) > self._most:
                [(largest, _)] = Counter(each.scope for each in self._results).most_common(1)
                del self._results[next(each for each in self._results if each.scope == largest)]
