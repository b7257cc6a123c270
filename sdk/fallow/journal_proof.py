"""Proofs about the journal's tree (RFC 6962 §2.1): records under a root, and one tree as the beginning of another.

One proof shows any number of leaves at once: the roots of the largest subtrees that hold none of them, from left to
right. Neighbours share it, so that a job of ten thousand tasks in a row needs little more of it than a single record.
"""

from __future__ import annotations

import hashlib
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Final

from fallow.ids import DIGEST_BYTES, Digest
from fallow.merkle import EMPTY_ROOT, node_digest

SALT_BYTES: Final = 16
_LEAF_NUMBERS: Final = struct.Struct(">QQQ")
_LEAF_PREFIX: Final = b"\x00"

Subtree = Callable[[int, int], bytes]
"""The root over the leaves from the first number up to, not including, the second, both counted from 0."""


class ProofWrong(Exception):
    """A proof that does not show what it should; the message says why."""


def leaf_of(*, salt: bytes, sequence: int, at_ms: int, epoch: int, event: bytes) -> Digest:
    """The leaf of a record: SHA-256(0x00 ‖ salt ‖ sequence ‖ at_ms ‖ epoch ‖ event bytes), numbers as u64 big-endian.

    0x00 is the leaf domain of RFC 6962 §2.1; everything before the event has a fixed length, so no two records share an
    input.
    """
    assert len(salt) == SALT_BYTES, "a salt has 16 bytes"
    return Digest(
        hashlib.sha256(b"".join((_LEAF_PREFIX, salt, _LEAF_NUMBERS.pack(sequence, at_ms, epoch), event))).digest()
    )


def inclusion_of(indices: Sequence[int], size: int, subtree: Subtree) -> list[bytes]:
    """The proof that these leaves (from 0, rising) stand in the tree of `size` leaves."""
    assert all(low < high for low, high in pairwise(indices)), "indices rise"
    assert not indices or 0 <= indices[0] <= indices[-1] < size, "leaves of the tree"
    proof: list[bytes] = []

    def walk(low: int, high: int) -> None:
        if not _any_between(indices, low, high):
            proof.append(subtree(low, high))
        elif high - low > 1:
            middle = low + _left_of(high - low)
            walk(low, middle)
            walk(middle, high)

    if size:
        walk(0, size)
    return proof


def root_shown(leaves: Mapping[int, bytes], size: int, proof: Sequence[bytes]) -> Digest:
    """The root of the tree of `size` leaves that holds `leaves` (by index from 0) and otherwise what `proof` says.

    Raises ProofWrong when the proof is of another shape.
    """
    indices = sorted(leaves)
    if indices and not 0 <= indices[0] <= indices[-1] < size:
        raise ProofWrong(f"a record {indices[-1] + 1} is not among {size}")
    if any(len(digest) != DIGEST_BYTES for digest in proof):
        raise ProofWrong(f"the proof holds something that has not {DIGEST_BYTES} bytes")
    rest = iter(proof)

    def walk(low: int, high: int) -> bytes:
        if not _any_between(indices, low, high):
            found = next(rest, None)
            if found is None:
                raise ProofWrong("the proof is too short")
            return found
        if high - low == 1:
            return leaves[low]
        middle = low + _left_of(high - low)
        left = walk(low, middle)
        return node_digest(left, walk(middle, high))

    root = walk(0, size) if size else EMPTY_ROOT
    if next(rest, None) is not None:
        raise ProofWrong("the proof is too long")
    return Digest(root)


def consistency_of(old_size: int, size: int, subtree: Subtree) -> list[bytes]:
    """The proof that the tree of `old_size` leaves is the beginning of that of `size` (RFC 6962 §2.1.2)."""
    assert 0 <= old_size <= size, "a journal only grows"
    proof: list[bytes] = []
    if not 0 < old_size < size:
        return proof
    low, high, whole = 0, size, True
    above: list[bytes] = []
    while old_size != high:
        middle = low + _left_of(high - low)
        if old_size <= middle:
            above.append(subtree(middle, high))
            high = middle
        else:
            above.append(subtree(low, middle))
            low, whole = middle, False
    if not whole:
        proof.append(subtree(low, high))
    return [*proof, *reversed(above)]


def check_consistency(*, old_size: int, old_root: bytes, size: int, root: bytes, proof: Sequence[bytes]) -> None:
    """Returns when `proof` shows that the older tree is the beginning of the newer (RFC 9162 §2.1.4.2).

    Raises ProofWrong.
    """
    if not 0 <= old_size <= size:
        raise ProofWrong(f"a journal of {size} records does not go on from {old_size}")
    if old_size in (0, size):
        if proof or (old_size == size and old_root != root):
            raise ProofWrong("two roots of one size")
        return
    path = list(proof)
    if old_size & (old_size - 1) == 0:
        path.insert(0, old_root)
    if not path:
        raise ProofWrong("the proof is too short")
    first, last = old_size - 1, size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    old = new = path[0]
    for digest in path[1:]:
        if last == 0:
            raise ProofWrong("the proof is too long")
        if first & 1 or first == last:
            old, new = node_digest(digest, old), node_digest(digest, new)
            while not first & 1 and first:
                first, last = first >> 1, last >> 1
        else:
            new = node_digest(new, digest)
        first, last = first >> 1, last >> 1
    if last != 0 or old != old_root or new != root:
        raise ProofWrong("the newer journal does not go on from the older one")


def _any_between(indices: Sequence[int], low: int, high: int) -> bool:
    at = bisect_left(indices, low)
    return at < len(indices) and indices[at] < high


def _left_of(count: int) -> int:
    """The largest power of two below `count`."""
    return 1 << ((count - 1).bit_length() - 1)
