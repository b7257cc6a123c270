"""Checking the answer to a challenge in an engine child of an operator's worker: at a small part of the work."""

from __future__ import annotations

from hashlib import shake_256
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fallow.challenge import (
    FILL_BLOCK_BYTES,
    MANIFEST,
    OUTPUT_SCHEMA_DIGEST,
    ChallengeKind,
    ChallengePlan,
    ChallengeVerdict,
)
from fallow.errors import FallowError
from fallow.ids import DIGEST_BYTES
from fallow.merkle import leaf_digest, verify_inclusion
from fallow.row_block import RowBlock
from fallow.rows import RowCodec
from fallow_worker.engine.challenge import (
    WORDS_PER_BLOCK,
    Words,
    drawn_rows,
    factor,
    first_blocks,
    left_rows,
    matrices,
    mix,
    partner,
    proof_length,
    walk_index,
    walk_on,
    walk_start,
)

ROUNDS: Final = 64
"""Random vectors of ±1 in Freivalds' test (1977): a wrong row passes each of them with a chance of ½ at most."""
TOLERANCE_FACTOR: Final = 16.0
"""λ below. Honest rows on x86-64 stayed under 0.5; rows whose factors were rounded to tf32 or fp16 lay above 100."""
_UNIT_ROUND_OFF: Final = 2.0**-24

Float64s = NDArray[np.float64]


class _WrongError(Exception):
    """One sentence on what is wrong with an answer."""


def verdict(plan: ChallengePlan, block: RowBlock, entropy: bytes) -> ChallengeVerdict:
    """Whether the answer in `block` holds. `entropy` is fresh and was unknown when the answer was committed to."""
    try:
        shown = _Reader(_answer_in(block))
        if plan.kind is ChallengeKind.SPEED:
            _check_speed(plan, shown, entropy)
        else:
            _check_memory(plan, shown)
        shown.end()
    except _WrongError as wrong:
        return ChallengeVerdict(holds=False, reason=str(wrong))
    return ChallengeVerdict(holds=True, reason="")


def _answer_in(block: RowBlock) -> bytes:
    try:
        rows = RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST).decode(block)
        values = rows.columns["answer"]
    except FallowError as error:
        raise _WrongError(f"it cannot be read: {error.message}") from None
    value = values[0] if len(values) == 1 else None
    if not isinstance(value, bytes):
        raise _WrongError("it is not one row of bytes")
    return value


class _Reader:
    """Takes an answer apart from front to back."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        """The next bytes."""
        piece = self._data[self._at : self._at + length]
        if len(piece) != length:
            raise _WrongError(f"it ends after {len(self._data)} bytes")
        self._at += length
        return piece

    def leaf(self, root: bytes, index: int, count: int, length: int) -> bytes:
        """The next bytes, which the proof after them shows to be leaf `index` of `count`."""
        data = self.take(length)
        proof = self.take(proof_length(index, count) * DIGEST_BYTES)
        siblings = [proof[at : at + DIGEST_BYTES] for at in range(0, len(proof), DIGEST_BYTES)]
        leaf = leaf_digest(index, data)
        if not verify_inclusion(root=root, leaf=leaf, index=index, leaf_count=count, proof=siblings):
            raise _WrongError(f"leaf {index} is not under its root")
        return data

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise _WrongError(f"{len(self._data) - self._at} bytes too many")


# ------------------------------------------------------------------------------------------------- speed


def _check_speed(plan: ChallengePlan, shown: _Reader, entropy: bytes) -> None:
    root = shown.take(DIGEST_BYTES)
    leaves = drawn_rows(plan, root)
    rows = [shown.leaf(root, leaf, plan.rows * plan.steps, 4 * plan.columns) for leaf in leaves]
    products = np.frombuffer(b"".join(rows), "<f4").reshape(len(rows), plan.columns).astype(np.float64)
    if not np.isfinite(products).all():
        raise _WrongError("a row holds what is no number")
    base, right = matrices(plan)
    numbers = np.array([leaf % plan.rows for leaf in leaves])
    factors = np.array([[factor(plan, leaf // plan.rows)] for leaf in leaves], np.float32)
    left = left_rows(base[numbers], factors).astype(np.float64)
    excess = freivalds_excess(left, right.astype(np.float64), products, entropy)
    worst = int(excess.argmax())
    if excess[worst] > TOLERANCE_FACTOR:
        step, row = divmod(leaves[worst], plan.rows)
        raise _WrongError(f"row {row} of product {step} is not the product of its factors")


def freivalds_excess(left: Float64s, right: Float64s, products: Float64s, entropy: bytes) -> Float64s:
    """How far each row of `products` is from left · right, in units of the rounding that float32 may do to it.

    |y·r − x·(W r)| over √(inner + columns) · u · ‖x‖ · ‖W‖_F / √inner, the largest over `ROUNDS` vectors r of ±1 drawn
    from `entropy`: an honest sum of n rounded products is off by about √n · u times its size.
    """
    inner, columns = right.shape
    bits = np.unpackbits(np.frombuffer(shake_256(entropy).digest(columns * ROUNDS // 8), np.uint8))
    vectors = bits.reshape(columns, ROUNDS).astype(np.float64) * 2 - 1
    differences = np.abs(products @ vectors - left @ (right @ vectors)).max(axis=1)
    sizes = np.linalg.norm(left, axis=1) * np.linalg.norm(right) / np.sqrt(inner)
    excess: Float64s = differences / (np.sqrt(inner + columns) * _UNIT_ROUND_OFF * np.maximum(sizes, 1e-30))
    return excess


# ------------------------------------------------------------------------------------------------- memory


def _check_memory(plan: ChallengePlan, shown: _Reader) -> None:
    root = shown.take(DIGEST_BYTES)
    hashed = walk_start(plan, root)
    first = first_blocks(plan.seed)
    again: Words = np.empty(WORDS_PER_BLOCK, np.uint64)
    spare: Words = np.empty(WORDS_PER_BLOCK, np.uint64)

    def block(index: int) -> Words:
        found = np.frombuffer(shown.leaf(root, index, plan.blocks, FILL_BLOCK_BYTES), "<u8")
        if index < len(first) and not np.array_equal(found, first[index]):
            raise _WrongError(f"block {index} is not of this seed")
        return found

    for _ in range(plan.samples):
        index = walk_index(plan, hashed)
        walked, before = block(index), block(index - 1)
        other = block(partner(index, before))
        mix(before, other, again, spare)
        if not np.array_equal(walked, again):
            raise _WrongError(f"block {index} was not mixed from those before it")
        hashed = walk_on(hashed, walked.tobytes())
