"""The prefix cache: for each content, a tree of the blocks whose keys and values are kept.

A content is the effect of an adapter on the base. Blocks that were computed under one content are
never found under another. Tokens themselves are compared, not their hashes, so no hit is false.
"""

from bisect import bisect_left
from collections import OrderedDict, abc
from dataclasses import dataclass, field
from operator import attrgetter

from infuse.server.engine.native.cache.blocks import Blocks
from infuse.server.engine.native.sequences.sequence import Sequence, common_tokens

_TOKENS = attrgetter("tokens")


@dataclass(eq=False, slots=True)
class Node:
    """One block in the tree: its tokens follow those of its ancestors."""

    tokens: tuple[int, ...]
    parent: "Node | None" = None
    block: int | None = None
    """None at a root, and while the running sequence `owner` computes the tokens."""
    owner: Sequence | None = None
    children: list["Node"] = field(default_factory=list)
    """Sorted by their tokens."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a look-up: which of a sequence's first tokens are cached or being computed."""

    path: list[Node]
    """The blocks that are cached."""
    tokens: int
    """How many of the sequence's tokens are in those blocks."""
    owner: Sequence | None
    """The running sequence that computes the tokens after those."""
    expected: int
    """How many of the sequence's tokens will be cached once `owner` has computed its prompt."""


class PrefixCache:
    """Finds, keeps and evicts blocks by their tokens.

    Blocks stay until sequences need the room. The least recently used go first, children before
    parents.
    """

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._roots: dict[abc.Hashable, Node] = {}
        self._keys: dict[Node, abc.Hashable] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()
        """All cached nodes, least recently used first; a node comes before its parent."""
        self._nodes: dict[int, Node] = {}
        """Block -> its node."""

    def __len__(self) -> int:
        return len(self._used)

    def find(self, content: abc.Hashable, tokens: abc.Sequence[int], most: int) -> Found:
        """Find the longest prefix, up to `most` tokens, that is cached or being computed."""
        node = self._roots.get(content)
        path: list[Node] = []
        found = expected = 0
        owner: Sequence | None = None
        while node is not None and expected < most:
            node, common = self._closest(node, self._piece(tokens, expected))
            common = min(common, most - expected)
            if node is None or common == 0:
                break
            expected += common
            if node.block is None:
                owner = owner or node.owner
            elif owner is None:
                path.append(node)
                found = expected
            if common < len(node.tokens):
                break
        return Found(path, found, owner, expected)

    def touch(self, path: abc.Sequence[Node]) -> None:
        """Mark these blocks as used most recently."""
        for node in reversed(path):
            self._used.move_to_end(node)

    def keep(self, content: abc.Hashable, tokens: abc.Sequence[int], seq_id: int) -> None:
        """Keep the keys and values of a sequence's computed tokens as blocks."""
        path = [self._root(content)]
        start = 0
        while start < len(tokens):
            child = self._holder(path[-1], self._piece(tokens, start))
            if child is None:
                break
            path.append(child)
            start += len(child.tokens)
        if start < len(tokens):
            for block in self._blocks.keep(seq_id, start=start, tokens=len(tokens) - start):
                path.append(self._add(path[-1], self._piece(tokens, start), block))
                start += len(path[-1].tokens)
        self.touch(path[1:])
        self._forget_if_empty(path[0])

    def detach(self, seq_id: int) -> None:
        """Detach a sequence's blocks before it is released, and evict older ones to make room."""
        left = self._blocks.detach(seq_id)
        if left:
            attached = {self._nodes[block] for block in left}
            for _ in left:
                oldest = next(filter(self._is_detached, self._used), None)
                if oldest is None or any(node in attached for node in _subtree(oldest)):
                    break
                self._remove(oldest)
            for block in self._blocks.detach(seq_id):
                if block in self._nodes:
                    self._remove(self._nodes[block])

    def expect(
        self, content: abc.Hashable, tokens: abc.Sequence[int], owner: Sequence
    ) -> list[Node]:
        """Note that a running sequence is computing these tokens, so that others can wait for it.

        Returns the nodes that were added for `forget_expected`.
        """
        node = self._root(content)
        expected: list[Node] = []
        start = 0
        while start < len(tokens):
            piece = self._piece(tokens, start)
            child, common = self._closest(node, piece)
            if child is None or common < len(piece):
                child = self._insert(node, Node(piece, node, owner=owner))
                expected.append(child)
            node = child
            start += len(piece)
        return expected

    def forget_expected(self, expected: abc.Sequence[Node]) -> None:
        for node in expected:
            if node.block is None and node.parent is not None:
                self._remove(node)

    def forget(self, content: abc.Hashable) -> None:
        """Drop all blocks of a content."""
        root = self._roots.get(content)
        for node in list(root.children) if root is not None else ():
            self._remove(node)

    def evict(self) -> bool:
        """Drop some blocks so that sequences get room. False: no block's room would become free."""
        kept = (node.block for node in self._used if node.block is not None)
        blocks = self._blocks.to_evict(kept)
        for block in blocks:
            # A block goes with any of its ancestors.
            if block in self._nodes:
                self._remove(self._nodes[block])
        return bool(blocks)

    def _is_detached(self, node: Node) -> bool:
        return node.block is not None and self._blocks.is_detached(node.block)

    def _piece(self, tokens: abc.Sequence[int], start: int) -> tuple[int, ...]:
        size = self._blocks.size or len(tokens)
        return tuple(tokens[start : start + size])

    def _closest(self, parent: Node, piece: tuple[int, ...]) -> tuple[Node | None, int]:
        """Find the child that shares most of its first tokens with the piece, and how many."""
        at = bisect_left(parent.children, piece, key=_TOKENS)
        best, most = None, 0
        for child in parent.children[max(0, at - 1) : at + 1]:
            common = common_tokens(child.tokens, piece)
            if self._blocks.size is None and child.tokens != piece:
                common = 0
            if common > most:
                best, most = child, common
        return best, most

    def _holder(self, parent: Node, piece: tuple[int, ...]) -> Node | None:
        """Find the cached child that begins with the whole piece."""
        child, common = self._closest(parent, piece)
        held = child is not None and child.block is not None and common == len(piece)
        return child if held else None

    def _add(self, parent: Node, piece: tuple[int, ...], block: int) -> Node:
        node, common = self._closest(parent, piece)
        if node is None or not common == len(piece) == len(node.tokens):
            node = self._insert(parent, Node(piece, parent))
        node.block, node.owner = block, None
        self._nodes[block] = node
        self._used[node] = None
        at = parent.children.index(node)
        for before in parent.children[max(0, at - 1) : at]:
            if before.block is not None and piece[: len(before.tokens)] == before.tokens:
                # That was the incomplete last block of a sequence that has gone on.
                self._remove(before)
        return node

    def _insert(self, parent: Node, node: Node) -> Node:
        at = bisect_left(parent.children, node.tokens, key=_TOKENS)
        parent.children.insert(at, node)
        return node

    def _remove(self, node: Node) -> None:
        """Remove a node and all its descendants."""
        parent = node.parent
        assert parent is not None, "a root is forgotten, not removed"
        parent.children.remove(node)
        for each in list(_subtree(node)):
            each.parent = None
            if each.block is not None:
                del self._used[each], self._nodes[each.block]
                self._blocks.drop(each.block)
        if parent in self._keys:
            self._forget_if_empty(parent)

    def _root(self, content: abc.Hashable) -> Node:
        if content not in self._roots:
            self._roots[content] = Node(())
            self._keys[self._roots[content]] = content
        return self._roots[content]

    def _forget_if_empty(self, root: Node) -> None:
        if not root.children and root in self._keys:
            del self._roots[self._keys.pop(root)]


def _subtree(node: Node) -> abc.Iterator[Node]:
    pending = [node]
    while pending:
        each = pending.pop()
        yield each
        pending += each.children
