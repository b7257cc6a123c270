"""Proofs about trees: what is in them is shown, what is not cannot be, and older trees begin newer ones."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.journal_proof import ProofWrong, check_consistency, consistency_of, inclusion_of, root_shown
from fallow.merkle import inclusion_proof, root_of


def leaves(count: int) -> list[bytes]:
    return [hashlib.sha256(number.to_bytes(8, "big")).digest() for number in range(count)]


@settings(deadline=None)
@given(st.data())
def test_any_leaves_are_shown_under_the_root(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 70))
    tree = leaves(size)
    wanted = sorted(data.draw(st.sets(st.integers(0, size - 1))))
    proof = inclusion_of(wanted, size, lambda low, high: root_of(tree[low:high]))
    shown = {index: tree[index] for index in wanted}
    assert root_shown(shown, size, proof) == root_of(tree)
    if not wanted:
        return
    changed = data.draw(st.sampled_from(wanted))
    assert root_shown({**shown, changed: bytes(32)}, size, proof) != root_of(tree)
    if proof:
        with pytest.raises(ProofWrong):
            root_shown(shown, size, proof[:-1])
    with pytest.raises(ProofWrong):
        root_shown(shown, size, [*proof, bytes(32)])


def test_proof_of_one_leaf_is_that_of_the_standard() -> None:
    tree = leaves(11)
    for index in range(11):
        proof = inclusion_of([index], 11, lambda low, high: root_of(tree[low:high]))
        assert sorted(proof) == sorted(inclusion_proof(tree, index))


@settings(deadline=None)
@given(st.integers(0, 64), st.integers(0, 64), st.data())
def test_older_trees_are_shown_to_begin_newer_ones(one: int, other: int, data: st.DataObject) -> None:
    old_size, size = sorted((one, other))
    tree = leaves(size)
    proof = consistency_of(old_size, size, lambda low, high: root_of(tree[low:high]))
    facts = {"old_size": old_size, "old_root": root_of(tree[:old_size]), "size": size, "root": root_of(tree)}
    check_consistency(**facts, proof=proof)  # type: ignore[arg-type]  # names and types stand side by side above
    if old_size == 0:
        return
    position = data.draw(st.integers(0, old_size - 1))
    forked = [*tree[:position], bytes(32), *tree[position + 1 :]]
    with pytest.raises(ProofWrong):
        check_consistency(**{**facts, "old_root": root_of(forked[:old_size])}, proof=proof)  # type: ignore[arg-type]
    with pytest.raises(ProofWrong):
        check_consistency(**facts, proof=[*proof, bytes(32)])  # type: ignore[arg-type]


def test_a_record_beyond_the_tree_is_refused() -> None:
    with pytest.raises(ProofWrong, match="not among 3"):
        root_shown({3: bytes(32)}, 3, [])
