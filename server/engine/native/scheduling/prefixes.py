"""Prefix caching for running and later requests: a prefix that they share is computed once.

A new sequence begins with the keys and values of its longest cached prefix. If a sequence of higher
rank is computing that prefix at the moment, the new sequence waits for it.
"""

from collections import Counter
from collections.abc import Hashable

from infuse.server.engine.native.cache.kv_cache import KVCache
from infuse.server.engine.native.scheduling.prefix_cache import Node, PrefixCache
from infuse.server.engine.native.sequences.sequence import Sequence

LEAST_SHARED = 32
"""Tokens of the shortest prefix that is shared: fewer are not worth a copy or a step of waiting."""


class Prefixes:
    """Reserves, begins and releases sequences in the KV cache, and keeps prefixes in it.

    All cached blocks are evicted before any sequence is preempted.
    """

    def __init__(self, cache: KVCache, across_orders: bool) -> None:
        """Without `across_orders`, only the requests of one order share prefixes, which are dropped
        with the last of them. Nothing is shared if the cache cannot share."""
        self._cache = cache
        self._across_orders = across_orders and cache.shares
        self._known = PrefixCache(cache.blocks)
        self._members: Counter[Hashable] = Counter()
        """Content -> how many of its sequences have not ended."""
        self._computing: dict[Sequence, list[Node]] = {}
        """Running sequences whose prompts others may wait for -> the nodes that they compute."""
        self._awaited: dict[Sequence, Sequence] = {}
        """A sequence that waits for another's prompt, until it begins itself -> that other."""
        self.queried_tokens = 0
        """Tokens of the prompts that were admitted."""
        self.hit_tokens = 0
        """How many of the queried tokens were prefix hits."""

    @property
    def kept_tokens(self) -> int:
        return self._cache.blocks.tokens

    def add(self, sequence: Sequence) -> None:
        """Count a sequence that has arrived."""
        self._members[self._content(sequence)] += 1

    def must_wait(self, sequence: Sequence) -> bool:
        """Whether a sequence of higher rank is computing a prefix of this one."""
        if self._awaited.get(sequence) in self._computing:
            return True
        if not self._shares(sequence):
            return False
        most = sequence.most_skippable
        found = self._known.find(self._content(sequence), sequence.sharable, most)
        owner = found.owner
        if owner is None or owner.rank > sequence.rank:
            return False
        if not sequence.can_take_scores(owner):
            most = sequence.skippable
        if min(found.expected, most) - min(found.tokens, most) < LEAST_SHARED:
            return False
        self._awaited[sequence] = owner
        return True

    def begin(self, sequence: Sequence, tokens: int) -> bool:
        """Make room for the first `tokens` tokens of a new sequence and copy its cached prefix
        there. False: there is no room."""
        if sequence in self._awaited:
            sequence.take_scores(self._awaited[sequence])
        while True:
            path, shared = self._find(sequence)
            blocks = [node.block for node in path if node.block is not None]
            seq_id = sequence.seq_id
            if shared and self._cache.begin(seq_id, blocks, shared=shared, tokens=tokens):
                break
            if not shared and self._cache.reserve(seq_id, tokens):
                break
            if not self._known.evict():
                return False
        self._awaited.pop(sequence, None)
        self._known.touch(path)
        is_new = sequence.cached_tokens is None
        sequence.begin(shared)
        if self._shares(sequence):
            if is_new:
                self.queried_tokens += sequence.prompt_tokens
                self.hit_tokens += shared
            self._expect(sequence)
        return True

    def grow(self, sequence: Sequence, ahead: int = 0) -> bool:
        """Make room for all tokens of a sequence and `ahead` more. False: there is no room."""
        while not self._cache.reserve(sequence.seq_id, len(sequence.tokens) + ahead):
            if not self._known.evict():
                return False
        return True

    def settle(self) -> None:
        """Keep the prompts that were completed since the last step."""
        for sequence in [s for s in self._computing if s.computed >= s.prompt_tokens]:
            self._keep(sequence)
            self._forget_expected(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Release a preempted sequence's cache. Sequences that waited for it no longer do."""
        self._forget_expected(sequence)
        self._awaited = {s: other for s, other in self._awaited.items() if other is not sequence}
        self._release(sequence)

    def end(self, sequence: Sequence) -> None:
        """Release the cache of a sequence that has ended, if any, and keep what it computed."""
        content = self._content(sequence)
        if self._across_orders or (self._shares(sequence) and self._members[content] > 1):
            self._keep(sequence)
        self._forget_expected(sequence)
        self._awaited.pop(sequence, None)
        self._release(sequence)
        self._members[content] -= 1
        if not self._members[content]:
            del self._members[content]
            if not self._across_orders:
                self._known.forget(content)

    def _content(self, sequence: Sequence) -> Hashable:
        """The key of the prefix tree: keys and values depend on the adapter's effect beside the
        tokens, and only requests with the same salt (and order) may share them."""
        lease = sequence.request.lease
        digest = "" if lease is None or lease.vectors.is_base else lease.vectors.digest
        order = None if self._across_orders else sequence.request.order
        return digest, sequence.request.cache_salt, order

    def _shares(self, sequence: Sequence) -> bool:
        within = self._cache.shares and sequence.request.order is not None
        return self._across_orders or within

    def _find(self, sequence: Sequence) -> tuple[list[Node], int]:
        """Find the cached blocks that a sequence can begin with, and how many of their tokens."""
        if not self._shares(sequence):
            return [], 0
        content = self._content(sequence)
        found = self._known.find(content, sequence.sharable, sequence.skippable)
        return (found.path, found.tokens) if found.tokens >= LEAST_SHARED else ([], 0)

    def _expect(self, sequence: Sequence) -> None:
        prompt = sequence.sharable[: sequence.prompt_tokens]
        if len(prompt) - sequence.computed >= LEAST_SHARED:
            expected = self._known.expect(self._content(sequence), prompt, sequence)
            self._computing[sequence] = expected

    def _keep(self, sequence: Sequence) -> None:
        computed = sequence.computed if self._across_orders else sequence.prompt_tokens
        tokens = sequence.sharable[: min(computed, sequence.computed)]
        if len(tokens) >= max(LEAST_SHARED, sequence.source_tokens):
            self._known.keep(self._content(sequence), tokens, sequence.seq_id)

    def _release(self, sequence: Sequence) -> None:
        self._known.detach(sequence.seq_id)
        self._cache.release(sequence.seq_id)

    def _forget_expected(self, sequence: Sequence) -> None:
        self._known.forget_expected(self._computing.pop(sequence, []))
