"""Who is let in when many have been: a flood refuses itself, and not others."""

from collections import Counter
from collections.abc import Sequence

from server.engine.request import GenerationRequest


class Places:
    """So many requests may be in flight. Once they are, a tenant with less than an even part of
    them may have up to as many again taken; and up to half as many, an adapter with less than an
    even part of what its tenant has."""

    def __init__(self, places: int) -> None:
        self._places = places
        self.taken = 0
        """How many requests are in flight."""
        self._of: dict[str, Counter[str]] = {}
        """Tenant -> adapter -> how many are taken."""

    def take(self, requests: Sequence[GenerationRequest]) -> bool:
        """A place for each, or for none."""
        for number, request in enumerate(requests):
            if not self._may_take(request):
                for taken in requests[:number]:
                    self.leave(taken)
                return False
            self.taken += 1
            self._of.setdefault(request.tenant, Counter())[request.adapter] += 1
        return True

    def leave(self, request: GenerationRequest) -> None:
        adapters = self._of[request.tenant]
        self.taken -= 1
        adapters[request.adapter] -= 1
        if not adapters[request.adapter]:
            del adapters[request.adapter]
        if not adapters:
            del self._of[request.tenant]

    def _may_take(self, request: GenerationRequest) -> bool:
        if self.taken < self._places:
            return True
        adapters = self._of.get(request.tenant, Counter())
        mine = adapters.total()
        if mine < self._places // len(self._of.keys() | {request.tenant}):
            return self.taken < 2 * self._places
        if adapters[request.adapter] < mine // len(adapters.keys() | {request.adapter}):
            return self.taken < self._places + self._places // 2
        return False
