"""A cache of compiled grammars and refusals, bounded and fair among scopes."""

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from infuse.server.engine.constraints.vetting import GrammarKind

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Key:
    """What a result is cached by."""

    scope: str
    """Only requests of one scope share results: the time of a hit would reveal others' sources."""
    kind: GrammarKind
    digest: bytes


class Latest(Generic[_T]):
    """Keeps a bounded number of results. When full, it drops the least recently used result of the
    scope that has the most. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._results: dict[Key, _T] = {}
        """In order of their last use."""

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
