"""Remembers the latest answers, to tell which were slow."""

import heapq
from collections import deque

from infuse.server.observability.access import EndedRequest

_KEPT = 1000


class LatestAnswers:
    """The latest requests that generated something. Belongs to the event loop."""

    def __init__(self) -> None:
        self._kept: deque[EndedRequest] = deque(maxlen=_KEPT)

    def __len__(self) -> int:
        return len(self._kept)

    def tell(self, request: EndedRequest) -> None:
        if request.answered is not None:
            self._kept.append(request)

    def slowest(self, count: int) -> list[EndedRequest]:
        """The slowest first."""
        return heapq.nlargest(count, self._kept, key=lambda each: each.ended - each.started)
