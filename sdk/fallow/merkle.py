"""Merkle trees over rows, in the shapes and with the domain bytes of RFC 6962.

A row's leaf binds its position in its block: SHA-256(0x00 ‖ index as u64 big-endian ‖ row bytes). A node is
SHA-256(0x01 ‖ left ‖ right). The root of no leaves is SHA-256 of nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from hashlib import sha256

from fallow.ids import DIGEST_BYTES, Digest

EMPTY_ROOT = Digest(sha256(b"").digest())
"""The root of a tree without leaves."""

_LEAF_PREFIX = struct.Struct(">BQ")


def leaf_digest(index: int, row: bytes | bytearray | memoryview) -> Digest:
    """The leaf of the row that stands at `index` of its block."""
    leaf = sha256(_LEAF_PREFIX.pack(0, index))
    leaf.update(row)
    return Digest(leaf.digest())


def leaf_digests(rows: Iterable[bytes | bytearray | memoryview]) -> list[Digest]:
    """The leaves of the rows of one block, indexed from 0."""
    pack = _LEAF_PREFIX.pack
    join = b"".join
    return [Digest(sha256(join((pack(0, index), row))).digest()) for index, row in enumerate(rows)]


def node_digest(left: bytes, right: bytes) -> Digest:
    """The digest of an inner node."""
    return Digest(sha256(b"\x01" + left + right).digest())


def root_of(leaves: Sequence[bytes]) -> Digest:
    """The root over leaf digests, in order.

    Pairs are joined level by level and an odd last node is carried up, which gives the same tree as RFC 6962's split at
    the largest power of two.
    """
    if not leaves:
        return EMPTY_ROOT
    level: Sequence[bytes] = leaves
    while len(level) > 1:
        level = _next_level(level)
    return Digest(bytes(level[0]))


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[Digest, ...]:
    """The siblings from leaf `index` up to the root (RFC 6962 §2.1.1), lowest first."""
    assert 0 <= index < len(leaves), "a proof is for a leaf of the tree"
    proof: list[Digest] = []
    level: Sequence[bytes] = leaves
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            proof.append(Digest(bytes(level[sibling])))
        index >>= 1
        level = _next_level(level)
    return tuple(proof)


def verify_inclusion(*, root: bytes, leaf: bytes, index: int, leaf_count: int, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows `leaf` at `index` of the tree with that `root` and `leaf_count` (RFC 9162 §2.1.3.2)."""
    if not 0 <= index < leaf_count or any(len(sibling) != DIGEST_BYTES for sibling in proof):
        return False
    position, last = index, leaf_count - 1
    digest: bytes = leaf
    for sibling in proof:
        if last == 0:
            return False
        if position & 1 or position == last:
            digest = node_digest(sibling, digest)
            while not position & 1 and position:
                position >>= 1
                last >>= 1
        else:
            digest = node_digest(digest, sibling)
        position >>= 1
        last >>= 1
    return last == 0 and digest == root


def _next_level(level: Sequence[bytes]) -> list[bytes]:
    pairs = iter(level)
    parents: list[bytes] = [sha256(b"\x01" + left + right).digest() for left, right in zip(pairs, pairs, strict=False)]
    if len(level) & 1:
        parents.append(level[-1])
    return parents
