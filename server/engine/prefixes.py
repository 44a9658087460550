"""Requests of one order that begin alike: what they have in common is computed once.

The first of them leads. Its followers wait until it has computed their common tokens, begin with
a copy of its keys and values, and compute only the rest.
"""

from bisect import bisect_left
from collections.abc import Sequence as Rows
from dataclasses import replace

from server.engine.kv_cache import KVCache
from server.engine.request import GenerationRequest, Prefix
from server.engine.sequence import Sequence

LEAST_SHARED = 32
"""Tokens. A follower starts a step after its leader, which fewer are not worth."""


def share_prefixes(requests: Rows[GenerationRequest]) -> tuple[GenerationRequest, ...]:
    """The requests of an order, each told which earlier one it follows, and how far.

    They use the same adapter and differ in prompt, seed and `prompt_logprobs_from` only. Those
    that begin alike stand beside each other, as the choices of a prompt do.
    """
    found: dict[str, GenerationRequest] = {}
    leader: GenerationRequest | None = None
    for request in requests:
        if leader is not None:
            shared = _common_tokens(leader, request)
            # What it shares with a follower, that one's own leader mostly has as well, and earlier.
            while leader.prefix is not None and shared <= leader.prefix.tokens:
                leader = found[leader.prefix.leader]
                shared = _common_tokens(leader, request)
            if shared >= LEAST_SHARED:
                request = replace(request, prefix=Prefix(leader.id, shared))
        found[request.id] = leader = request
    return tuple(found.values())


def _common_tokens(leader: GenerationRequest, request: GenerationRequest) -> int:
    ours, theirs = request.prompt, leader.prompt
    shorter = min(len(ours), len(theirs))
    common = bisect_left(range(1, shorter + 1), True, key=lambda n: ours[:n] != theirs[:n])
    first = request.params.prompt_logprobs_from
    # A follower takes over its leader's scores, so where that has none they part.
    return common if leader.params.prompt_logprobs_from <= first else min(common, first)


class Prefixes:
    """Which waiting sequences follow which, and whose keys stay in the cache for that.

    The keys of a leader that ends before its followers have copied them are kept, as long as
    nobody needs the room; without them, the followers compute everything themselves.
    """

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._leaders: dict[Sequence, Sequence] = {}
        """Of each follower that has yet to copy."""
        self._kept: set[Sequence] = set()
        """Leaders that have ended."""

    def follow(self, sequence: Sequence, leader: Sequence) -> None:
        self._leaders[sequence] = leader

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether the leader is still to compute what they share."""
        leader = self._leaders.get(sequence)
        return leader is not None and leader.computed < sequence.shared_tokens

    def reserve(self, sequence: Sequence, tokens: int) -> bool:
        """Room for a new row, which begins with its leader's keys where it has one."""
        leader = self._leaders.get(sequence)
        if leader is None:
            return self._cache.reserve(sequence.row, tokens)
        if not self._cache.fork(leader.row, sequence.row, sequence.shared_tokens, tokens):
            return False
        sequence.begin_like(leader)
        self._leave(sequence)
        return True

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended: its row goes, unless followers are about to copy it."""
        self._leave(sequence)
        followers = [each for each, leader in self._leaders.items() if leader is sequence]
        ready = [each for each in followers if not self.must_wait(each)]
        for follower in followers:
            if follower not in ready:
                del self._leaders[follower]
        if ready:
            self._kept.add(sequence)
        else:
            self._cache.release(sequence.row)

    def drop(self, below: Sequence | None = None) -> bool:
        """Release the kept row of the last in rank, among those that rank below `below` where it
        is given. False: there is none."""
        kept = [each for each in self._kept if below is None or each.rank > below.rank]
        if not kept:
            return False
        last = max(kept, key=lambda each: each.rank)
        self._leaders = {f: leader for f, leader in self._leaders.items() if leader is not last}
        self._release(last)
        return True

    def _leave(self, follower: Sequence) -> None:
        leader = self._leaders.pop(follower, None)
        if leader in self._kept and leader not in self._leaders.values():
            self._release(leader)

    def _release(self, leader: Sequence) -> None:
        self._kept.remove(leader)
        self._cache.release(leader.row)
