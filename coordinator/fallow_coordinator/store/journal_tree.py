"""The journal's leaves as one Merkle tree (RFC 6962 §2.1), growing at its end."""

from __future__ import annotations

from fallow.ids import Digest
from fallow.merkle import EMPTY_ROOT, node_digest


class JournalTree:
    """A growing tree, held as the roots of its largest perfect subtrees: as many as its size has bits set."""

    def __init__(self) -> None:
        self._peaks: list[tuple[int, bytes]] = []
        """(height, root), falling in height."""
        self._size = 0

    @property
    def size(self) -> int:
        """How many leaves it has."""
        return self._size

    def copy(self) -> JournalTree:
        """Another tree with the same leaves."""
        made = JournalTree()
        made._peaks, made._size = list(self._peaks), self._size
        return made

    def add(self, leaf: bytes) -> None:
        """Appends a leaf."""
        self.add_subtree(leaf, 0)

    def add_subtree(self, root: bytes, height: int) -> None:
        """Appends the 2^height leaves of a perfect subtree; the tree's size is a multiple of that."""
        assert self._size % (1 << height) == 0, "a subtree stands where a perfect one can stand"
        self._size += 1 << height
        while self._peaks and self._peaks[-1][0] == height:
            _, left = self._peaks.pop()
            root, height = node_digest(left, root), height + 1
        self._peaks.append((height, root))

    def root(self) -> Digest:
        """The root over all leaves, in order."""
        if not self._peaks:
            return EMPTY_ROOT
        _, root = self._peaks[-1]
        for _, left in reversed(self._peaks[:-1]):
            root = node_digest(left, root)
        return Digest(root)
