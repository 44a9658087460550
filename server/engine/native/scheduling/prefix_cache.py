"""Which tokens the kept blocks of keys and values belong to: a tree of blocks for each content.

A content is what an adapter does to the base; what was computed under one is never found under
another. Tokens themselves are compared, not hashes of them, so nothing is taken for what it is not.
"""

from bisect import bisect_left
from collections import OrderedDict, abc
from dataclasses import dataclass, field
from operator import attrgetter

from server.engine.native.cache.blocks import Blocks
from server.engine.native.sequences.sequence import Sequence, common_tokens

_TOKENS = attrgetter("tokens")


@dataclass(eq=False, slots=True)
class Node:
    """The tokens of one block behind those of its parents."""

    tokens: tuple[int, ...]
    parent: "Node | None" = None
    block: int | None = None
    """None at a root, and while a running sequence, `owner`, computes it."""
    owner: Sequence | None = None
    children: list["Node"] = field(default_factory=list)
    """In the order of their tokens."""


@dataclass(frozen=True, slots=True)
class Found:
    """How far a row's tokens are known."""

    path: list[Node]
    """Blocks that are kept."""
    tokens: int
    """Tokens of the row in those blocks."""
    owner: Sequence | None
    """The sequence that computes what comes next."""
    expected: int
    """Tokens of the row that will be known then."""


class PrefixCache:
    """Kept until the room is needed, least recently used first, ends before beginnings."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks
        self._roots: dict[abc.Hashable, Node] = {}
        self._keys: dict[Node, abc.Hashable] = {}
        self._used: OrderedDict[Node, None] = OrderedDict()
        """All that are kept, least recently used first; a node before its parent."""
        self._nodes: dict[int, Node] = {}
        """Block -> its node."""

    def __len__(self) -> int:
        return len(self._used)

    def find(self, content: abc.Hashable, tokens: abc.Sequence[int], most: int) -> Found:
        """The longest beginning of a row that is known, or is being computed, up to `most`."""
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
        """These blocks were of use."""
        for node in reversed(path):
            self._used.move_to_end(node)

    def keep(self, content: abc.Hashable, tokens: abc.Sequence[int], row: int) -> None:
        """Keep all that has been computed of a row."""
        path = [self._root(content)]
        start = 0
        while start < len(tokens):
            child = self._holder(path[-1], self._piece(tokens, start))
            if child is None:
                break
            path.append(child)
            start += len(child.tokens)
        if start < len(tokens):
            for block in self._blocks.keep(row, start, len(tokens) - start):
                path.append(self._add(path[-1], self._piece(tokens, start), block))
                start += len(path[-1].tokens)
        self.touch(path[1:])
        self._forget_if_empty(path[0])

    def leave(self, row: int) -> None:
        """The row is about to be released: what is kept of it takes the place of older things."""
        left = self._blocks.leave(row)
        if left:
            mine = {self._nodes[block] for block in left}
            for _ in left:
                oldest = next(filter(self._has_place, self._used), None)
                if oldest is None or any(node in mine for node in _subtree(oldest)):
                    break
                self._remove(oldest)
            for block in self._blocks.leave(row):
                if block in self._nodes:
                    self._remove(self._nodes[block])

    def expect(
        self, content: abc.Hashable, tokens: abc.Sequence[int], owner: Sequence
    ) -> list[Node]:
        """Note that a running sequence computes these tokens, so that others can wait for it."""
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
        """Drop all that is kept under a content."""
        root = self._roots.get(content)
        for node in list(root.children) if root is not None else ():
            self._remove(node)

    def drop(self) -> bool:
        """Give some room to rows. False: nothing kept would make any."""
        kept = (node.block for node in self._used if node.block is not None)
        blocks = self._blocks.in_the_way(kept)
        for block in blocks:
            # It may have gone with one that it followed.
            if block in self._nodes:
                self._remove(self._nodes[block])
        return bool(blocks)

    def _has_place(self, node: Node) -> bool:
        return node.block is not None and self._blocks.has_place(node.block)

    def _piece(self, tokens: abc.Sequence[int], start: int) -> tuple[int, ...]:
        size = self._blocks.size or len(tokens)
        return tuple(tokens[start : start + size])

    def _closest(self, parent: Node, piece: tuple[int, ...]) -> tuple[Node | None, int]:
        """The child that has most of the piece's tokens in common with it, and how many."""
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
        """The kept child that has all of the piece."""
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
                # The end of a row that has gone on.
                self._remove(before)
        return node

    def _insert(self, parent: Node, node: Node) -> Node:
        at = bisect_left(parent.children, node.tokens, key=_TOKENS)
        parent.children.insert(at, node)
        return node

    def _remove(self, node: Node) -> None:
        """With all that follows it."""
        parent = node.parent
        assert parent is not None, "roots go by themselves"
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
