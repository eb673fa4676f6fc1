"""Which slots hold texts that begin with given tokens: a radix tree.

After Zheng et al. 2024, "SGLang: Efficient Execution of Structured Language Model Programs", section 3
(RadixAttention). Here a slot holds one whole text from its first token on, so the tree only finds; nothing is
kept in it but the numbers of slots.
"""

from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np

TOKEN_NBYTES: Final = 4


def pack(token_ids: Sequence[int]) -> bytes:
    """Token ids as the tree compares them, many at once."""
    return array("i", token_ids).tobytes()


class _Node:
    """Some tokens that follow those of the nodes above it; each slot in `slots` holds all of them."""

    __slots__ = ("children", "edge", "parent", "slots")

    def __init__(self, edge: bytes, parent: "_Node | None", slots: set[int]) -> None:
        self.edge = edge
        self.parent = parent
        self.slots = slots
        self.children: dict[bytes, _Node] = {}  # by their first token


class PrefixTree:
    """The texts of slots. Texts of different keys know nothing of each other."""

    def __init__(self) -> None:
        self._roots: dict[str, _Node] = {}
        self._ends: dict[int, tuple[str, _Node]] = {}  # of each slot's text

    def __len__(self) -> int:
        """How many slots hold a text."""
        return len(self._ends)

    def count_nodes(self) -> int:
        """How many parts the texts are cut into: at most two per slot, and one per key."""
        left, count = list(self._roots.values()), 0
        while left:
            node = left.pop()
            count += 1
            left += node.children.values()
        return count

    def insert(self, slot: int, tokens: bytes, key: str) -> None:
        """A slot holds a text now, instead of what it held before."""
        self.remove(slot)
        node = self._roots.setdefault(key, _Node(b"", None, set()))
        node.slots.add(slot)
        at = 0
        while at < len(tokens):
            first = tokens[at : at + TOKEN_NBYTES]
            child = node.children.get(first)
            if child is None:
                node.children[first] = child = _Node(tokens[at:], node, set())
            same = _count_common(child.edge, tokens, at)
            if same < len(child.edge):
                child = _split(child, same)
            child.slots.add(slot)
            at, node = at + same, child
        self._ends[slot] = key, node

    def remove(self, slot: int) -> None:
        """A slot holds nothing any more."""
        key, node = self._ends.pop(slot, ("", None))
        while node is not None:
            node.slots.discard(slot)
            parent = node.parent
            if parent is None:
                if not node.slots:
                    del self._roots[key]
            elif not node.slots:
                del parent.children[node.edge[:TOKEN_NBYTES]]
            else:
                _join(node, parent)
            node = parent

    def find(self, tokens: bytes, key: str) -> list[tuple[int, set[int]]]:
        """How many of the first tokens which slots hold, from few tokens to many."""
        found: list[tuple[int, set[int]]] = []
        node, at = self._roots.get(key), 0
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at : at + TOKEN_NBYTES])
            if node is None:
                break
            same = _count_common(node.edge, tokens, at)
            at += same
            found.append((at // TOKEN_NBYTES, node.slots))
            if same < len(node.edge):
                break
        return found


def _count_common(edge: bytes, tokens: bytes, at: int) -> int:
    """How many bytes of whole tokens an edge has in common with the tokens from byte `at` on."""
    if tokens.startswith(edge, at):
        return len(edge)
    count = min(len(edge), len(tokens) - at) // TOKEN_NBYTES
    differ = np.frombuffer(edge, np.int32, count) != np.frombuffer(tokens, np.int32, count, at)
    first = int(differ.argmax())
    return TOKEN_NBYTES * (first if differ[first] else count)


def _split(node: _Node, at: int) -> _Node:
    """Cut a node's edge in two; return the new node, which stands above it."""
    parent = node.parent
    assert parent is not None
    above = _Node(node.edge[:at], parent, set(node.slots))
    parent.children[above.edge[:TOKEN_NBYTES]] = above
    node.edge, node.parent = node.edge[at:], above
    above.children[node.edge[:TOKEN_NBYTES]] = node
    return above


def _join(node: _Node, parent: _Node) -> None:
    """Undo a cut that nobody needs any more: all texts of a node go on in its only child."""
    if len(node.children) == 1:
        [child] = node.children.values()
        if len(child.slots) == len(node.slots):
            child.edge, child.parent = node.edge + child.edge, parent
            parent.children[child.edge[:TOKEN_NBYTES]] = child
