"""Challenges and their checks without a child: honest answers hold, others do not, and what decides is exact."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.challenge import FILL_BLOCK_BYTES, MANIFEST, OUTPUT_SCHEMA_DIGEST, ChallengeKind, ChallengePlan
from fallow.merkle import inclusion_proof, leaf_digest, root_of, verify_inclusion
from fallow.row_block import RowBlock
from fallow.rows import RowCodec
from fallow_worker.engine import challenge, check

SPEED = ChallengePlan("cpu-0", ChallengeKind.SPEED, bytes(32), rows=16, inner=64, columns=32, steps=5, samples=64)
MEMORY = ChallengePlan("cpu-0", ChallengeKind.MEMORY, bytes(32), fill_bytes=1 << 20, samples=32)


def answered(plan: ChallengePlan) -> RowBlock:
    told: list[int] = []
    block = challenge.answer(plan, threads=1, allow_spinning=False, nonce=bytes(16), progress=told.append)
    assert told, "progress is told"
    return RowBlock.parse(block)


def changed(block: RowBlock, position: int) -> RowBlock:
    (row,) = RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST).decode(block).columns["answer"]
    assert isinstance(row, bytes)
    data = bytearray(row)
    data[position % len(data)] ^= 1
    codec = RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST)
    return RowBlock.parse(codec.encode({"answer": [bytes(data)]}, nonce=bytes(16)))


@pytest.mark.parametrize("plan", [SPEED, MEMORY], ids=["speed", "memory"])
def test_an_honest_answer_holds_and_no_other_seeds(plan: ChallengePlan) -> None:
    block = answered(plan)
    assert check.verdict(plan, block, bytes(32)).holds
    assert not check.verdict(replace(plan, seed=b"other".ljust(32)), block, bytes(32)).holds


@settings(max_examples=20, deadline=None)
@given(position=st.integers(0, 10**9), speed=st.booleans())
def test_an_answer_with_any_byte_changed_is_found_out(position: int, speed: bool) -> None:
    plan = SPEED if speed else MEMORY
    found = check.verdict(plan, changed(_BLOCKS[plan.kind], position), bytes(32))
    assert not found.holds and found.reason


@given(seed=st.binary(min_size=32, max_size=32), inner=st.sampled_from([64, 512, 4_096]))
@settings(max_examples=10, deadline=None)
def test_rounding_in_float32_passes_and_coarser_rounding_does_not(seed: bytes, inner: int) -> None:
    left = challenge.left_rows(challenge.uniform(seed, "a", (8, inner)), np.full((8, 1), 70.3, np.float32))
    right = challenge.uniform(seed, "b", (inner, 64))
    exact = (left.astype(np.float64), right.astype(np.float64))
    honest = check.freivalds_excess(*exact, (left @ right).astype(np.float64), seed)
    assert honest.max() < check.TOLERANCE_FACTOR / 8
    for digits in (10, 7):  # tf32 and bfloat16 keep so many bits after the first
        coarse = _rounded(left, digits) @ _rounded(right, digits)
        assert check.freivalds_excess(*exact, coarse.astype(np.float64), seed).min() > check.TOLERANCE_FACTOR


@given(count=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_a_tree_gives_the_proofs_that_the_vocabulary_gives(count: int) -> None:
    leaves = [leaf_digest(index, bytes([index % 256])) for index in range(count)]
    tree = challenge.Tree(leaves)
    assert tree.root == root_of(leaves)
    for index in range(count):
        proof = inclusion_proof(leaves, index)
        assert tree.proof(index) == b"".join(proof)
        assert len(proof) == challenge.proof_length(index, count)
        assert verify_inclusion(root=tree.root, leaf=leaves[index], index=index, leaf_count=count, proof=proof)


def test_seeded_matrices_are_the_same_on_every_machine() -> None:
    base, right = challenge.matrices(SPEED)
    assert base.min() >= -0.5 and base.max() < 0.5
    assert [float(value) for value in base[0, :3]] == PINNED
    assert 64 <= challenge.factor(SPEED, 3) < 128
    assert challenge.first_blocks(bytes(32)).nbytes == 2 * FILL_BLOCK_BYTES
    assert not np.array_equal(base[0, :3], right[0, :3])


PINNED = [-0.3733718991279602, 0.023326575756072998, 0.4482728838920593]


def _rounded(values: challenge.Float32s, digits: int) -> challenge.Float32s:
    drop = np.uint32(23 - digits)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + (np.uint32(1) << (drop - np.uint32(1)))) >> drop << drop).view(np.float32)


_BLOCKS = {plan.kind: answered(plan) for plan in (SPEED, MEMORY)}
