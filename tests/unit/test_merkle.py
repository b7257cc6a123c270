"""Merkle trees have the shapes of RFC 6962, and their proofs prove."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.merkle import (
    EMPTY_ROOT,
    inclusion_proof,
    leaf_digest,
    leaf_digests,
    node_digest,
    root_of,
    verify_inclusion,
)

rows = st.lists(st.binary(max_size=20), min_size=1, max_size=70)


def root_by_definition(leaves: list[bytes]) -> bytes:
    """RFC 6962 §2.1, word for word: split at the largest power of two below n."""
    if len(leaves) == 1:
        return leaves[0]
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    left, right = root_by_definition(leaves[:split]), root_by_definition(leaves[split:])
    return sha256(b"\x01" + left + right).digest()


def test_the_empty_root_is_the_digest_of_nothing() -> None:
    assert root_of([]) == EMPTY_ROOT == sha256(b"").digest()


def test_a_leaf_binds_index_and_bytes() -> None:
    assert leaf_digest(258, b"row") == sha256(b"\x00" + bytes([0, 0, 0, 0, 0, 0, 1, 2]) + b"row").digest()
    assert leaf_digest(0, b"row") != leaf_digest(1, b"row")
    assert leaf_digests([b"a", memoryview(b"b")]) == [leaf_digest(0, b"a"), leaf_digest(1, b"b")]


@given(rows)
def test_the_root_is_that_of_the_definition(given_rows: list[bytes]) -> None:
    leaves = leaf_digests(given_rows)
    assert root_of(leaves) == root_by_definition(list(leaves))


@given(rows, st.data())
def test_every_leaf_has_a_proof_that_verifies(given_rows: list[bytes], data: st.DataObject) -> None:
    leaves = leaf_digests(given_rows)
    index = data.draw(st.integers(0, len(leaves) - 1))
    proof = inclusion_proof(leaves, index)
    root = root_of(leaves)
    assert verify_inclusion(root=root, leaf=leaves[index], index=index, leaf_count=len(leaves), proof=proof)


@given(rows, st.data())
def test_a_proof_for_another_place_leaf_or_length_fails(given_rows: list[bytes], data: st.DataObject) -> None:
    leaves = leaf_digests(given_rows)
    count = len(leaves)
    index = data.draw(st.integers(0, count - 1))
    proof, root = inclusion_proof(leaves, index), root_of(leaves)

    def verifies(
        *, leaf: bytes = leaves[index], at: int = index, of: int = count, by: tuple[bytes, ...] = proof
    ) -> bool:
        return verify_inclusion(root=root, leaf=leaf, index=at, leaf_count=of, proof=by)

    assert not verifies(leaf=leaf_digest(index, b"something else entirely"))
    assert not verifies(at=-1)
    assert not verifies(at=count)
    assert not verifies(by=(*proof, leaves[0]))
    assert not any(verifies(at=other) for other in range(count) if other != index)
    if proof:
        assert not verifies(by=proof[:-1])
        assert not verifies(by=(proof[0][:-1], *proof[1:]))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 100_000])
def test_large_and_odd_trees_prove_their_last_leaf(count: int) -> None:
    leaves = leaf_digests(index.to_bytes(4, "big") for index in range(count))
    assert verify_inclusion(
        root=root_of(leaves),
        leaf=leaves[-1],
        index=count - 1,
        leaf_count=count,
        proof=inclusion_proof(leaves, count - 1),
    )


def test_node_digest_is_ordered() -> None:
    left, right = sha256(b"l").digest(), sha256(b"r").digest()
    assert node_digest(left, right) == sha256(b"\x01" + left + right).digest() != node_digest(right, left)
