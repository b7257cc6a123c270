"""Working out a challenge in an engine child: products of seeded matrices, or memory filled and walked; and an answer.

Everything follows from the plan's seed; nothing large travels. What was computed is bound by a Merkle root, and the
samples that are shown are drawn from that root (Fiat and Shamir 1986), so that an answer needs no second round: whoever
skips a part c of the work is caught but for (1 − c)^samples.

**Speed.** Step k multiplies X_k = p − round(p), p = base · factor_k, by `right`, in the runtime and with the provider
that run foreign programs. `base` and `right` are uniform float32 of the seed, factor_k lies in [64, 128): each step
has other rows, which anyone can make again one by one, at the price of three elementwise operations. A leaf is a row
of a product.

**Memory.** Block i mixes block i − 1 with an earlier one that the content of block i − 1 chooses (Argon2d's rule,
Biryukov, Dinur and Khovratovich 2015), so that with half of the memory most blocks must be computed over and over. A
leaf is a block. Then a walk: each step hashes the block that the hash so far points to; the blocks on the way are
shown with the two from which each was mixed (Biryukov and Khovratovich 2016, "Egalitarian computing").
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any, Final, cast

import numpy as np

# NumPy loads this one on first use, and then the sandbox has closed.
from numpy.random import Philox
from numpy.typing import NDArray

from fallow.challenge import FILL_BLOCK_BYTES, MANIFEST, OUTPUT_SCHEMA_DIGEST, ChallengeKind, ChallengePlan
from fallow.merkle import leaf_digest, node_digest
from fallow.rows import RowCodec
from fallow_worker.engine.onnx_program import ort, session_options

MODEL: Final = base64.b64decode(
    "CAg6hwIKHgoEYmFzZQoGZmFjdG9yEglzdHJldGNoZWQiA011bAoZCglzdHJldGNoZWQSBXdob2xlIgVSb3VuZAodCglzdHJldGNoZWQKBXdob2xl"
    "EgRsZWZ0IgNTdWIKHgoEbGVmdAoFcmlnaHQSB3Byb2R1Y3QiBk1hdE11bBIJY2hhbGxlbmdlWh8KBGJhc2USFwoVCAESEQoGEgRyb3dzCgcSBWlu"
    "bmVyWhQKBmZhY3RvchIKCggIARIECgIIAVojCgVyaWdodBIaChgIARIUCgcSBWlubmVyCgkSB2NvbHVtbnNiJAoHcHJvZHVjdBIZChcIARITCgYS"
    "BHJvd3MKCRIHY29sdW1uc0IECgAQEQ=="
)
"""base [rows, inner] → Mul factor → minus its Round → MatMul right [inner, columns] → product [rows, columns]."""
PROGRESS_STEPS: Final = 16
"""Progress is told about so often."""
WORDS_PER_BLOCK: Final = FILL_BLOCK_BYTES // 8
_ODD: Final = np.uint64(0xBF58476D1CE4E5B9)
"""Multiplier of SplitMix64 (Steele, Lea and Flood 2014)."""
_TURN: Final = np.uint64(29)
_INDEX: Final = struct.Struct("<Q")

Float32s = NDArray[np.float32]
Words = NDArray[np.uint64]
Progress = Callable[[int], None]


def answer(plan: ChallengePlan, *, threads: int, allow_spinning: bool, nonce: bytes, progress: Progress) -> bytes:
    """The output block of a challenge: one row of one column. Raises MemoryError; the plan was looked at before."""
    if plan.kind is ChallengeKind.SPEED:
        shown = _speed_answer(plan, threads=threads, allow_spinning=allow_spinning, progress=progress)
    else:
        shown = _memory_answer(plan, progress)
    return RowCodec(MANIFEST.output_schema, OUTPUT_SCHEMA_DIGEST).encode({"answer": [shown]}, nonce=nonce)


# ------------------------------------------------------------------------------------------------- what seeds give


def seeded(seed: bytes, what: str, number: int = 0) -> bytes:
    """32 bytes of the seed for one purpose."""
    return sha256(seed + what.encode() + _INDEX.pack(number)).digest()


def words(seed: bytes, what: str, count: int) -> Words:
    """Uniform words of the seed: Philox, whose stream NumPy keeps for ever (NEP 19)."""
    key = int.from_bytes(seeded(seed, what)[:16], "little")
    return Philox(key=key).random_raw(count)


def uniform(seed: bytes, what: str, shape: tuple[int, int]) -> Float32s:
    """Uniform float32 in [−0.5, 0.5), steps of 2⁻²⁴."""
    count = shape[0] * shape[1]
    halves = words(seed, what, (count + 1) // 2).view("<u4")[:count]
    drawn = (halves >> np.uint32(8)).astype(np.float32)
    drawn *= np.float32(2.0**-24)
    drawn -= np.float32(0.5)
    return drawn.reshape(shape)


def matrices(plan: ChallengePlan) -> tuple[Float32s, Float32s]:
    """`base` (rows, inner) and `right` (inner, columns)."""
    return (
        uniform(plan.seed, "base", (plan.rows, plan.inner)),
        uniform(plan.seed, "right", (plan.inner, plan.columns)),
    )


def factor(plan: ChallengePlan, step: int) -> np.float32:
    """By what `base` is stretched in a step: in [64, 128)."""
    drawn = int.from_bytes(seeded(plan.seed, "factor", step)[:3], "big")
    return np.float32(64 + drawn * 2.0**-18)


def left_rows(base: Float32s, factors: Float32s) -> Float32s:
    """Rows of X: each row of `base` stretched by its factor, what is over a whole number. Exact, as in the graph."""
    stretched = base * factors
    return cast("Float32s", stretched - np.rint(stretched))


def first_blocks(seed: bytes) -> Words:
    """Blocks 0 and 1."""
    return words(seed, "fill", 2 * WORDS_PER_BLOCK).reshape(2, WORDS_PER_BLOCK)


def partner(index: int, before: Words) -> int:
    """Which block is mixed with block `index` − 1 (`before`) into block `index`: one earlier than that."""
    return int(before[0]) % (index - 1)


def mix(before: Words, other: Words, into: Words, spare: Words) -> None:
    """Writes the next block: sums, shifts and products of words, turned by as much as `before` says."""
    np.add(before, other, out=spare)
    np.right_shift(spare, _TURN, out=into)
    np.bitwise_xor(spare, into, out=spare)
    np.multiply(spare, _ODD, out=spare)
    turn = int(before[1]) % (WORDS_PER_BLOCK - 1) + 1
    into[: WORDS_PER_BLOCK - turn] = spare[turn:]
    into[WORDS_PER_BLOCK - turn :] = spare[:turn]


# ------------------------------------------------------------------------------------------------- drawing and showing


def drawn_rows(plan: ChallengePlan, root: bytes) -> list[int]:
    """Leaves of a SPEED answer that are shown: step · rows + row."""
    leaves = plan.rows * plan.steps
    return [int.from_bytes(seeded(root, "row", number)[:8], "big") % leaves for number in range(plan.samples)]


def walk_start(plan: ChallengePlan, root: bytes) -> bytes:
    """The hash with which the walk begins."""
    return sha256(plan.seed + root).digest()


def walk_index(plan: ChallengePlan, hashed: bytes) -> int:
    """The block to which a hash points: one that was mixed."""
    return 2 + int.from_bytes(hashed[:8], "big") % (plan.blocks - 2)


def walk_on(hashed: bytes, block: bytes) -> bytes:
    """The hash after a step."""
    return sha256(hashed + block).digest()


def proof_length(index: int, count: int) -> int:
    """Digests in the inclusion proof of leaf `index` among `count`."""
    length = 0
    while count > 1:
        length += (index ^ 1) < count
        index //= 2
        count = (count + 1) // 2
    return length


class Tree:
    """All levels over some leaves, so that many proofs cost little."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        self._levels: list[Sequence[bytes]] = [leaves]
        while len(level := self._levels[-1]) > 1:
            pairs = [node_digest(level[at], level[at + 1]) for at in range(0, len(level) - 1, 2)]
            self._levels.append([*pairs, level[-1]] if len(level) % 2 else pairs)

    @property
    def root(self) -> bytes:
        """Over all leaves."""
        return self._levels[-1][0]

    def proof(self, index: int) -> bytes:
        """The siblings of a leaf, lowest first, one after the other."""
        siblings: list[bytes] = []
        for level in self._levels[:-1]:
            if (index ^ 1) < len(level):
                siblings.append(level[index ^ 1])
            index //= 2
        return b"".join(siblings)


# ------------------------------------------------------------------------------------------------- answers


def _speed_answer(plan: ChallengePlan, *, threads: int, allow_spinning: bool, progress: Progress) -> bytes:
    """root ‖ for each drawn row: the row ‖ its proof."""
    base, right = matrices(plan)
    options = session_options(threads=threads, allow_spinning=allow_spinning)
    session: Any = ort.InferenceSession(MODEL, sess_options=options, providers=["CPUExecutionProvider"])
    products: list[Float32s] = []
    leaves: list[bytes] = []
    for step in _told_on(plan.steps, progress):
        feed = {"base": base, "factor": np.array([factor(plan, step)], np.float32), "right": right}
        product: Float32s = session.run(["product"], feed)[0]
        leaves.extend(leaf_digest(len(leaves), row) for row in product.view(np.uint8))
        products.append(product)
    tree = Tree(leaves)
    pieces = [tree.root]
    for index in drawn_rows(plan, tree.root):
        step, row = divmod(index, plan.rows)
        pieces += [products[step][row].astype("<f4").tobytes(), tree.proof(index)]
    return b"".join(pieces)


def _memory_answer(plan: ChallengePlan, progress: Progress) -> bytes:
    """root ‖ for each step of the walk: its block, the block before, the partner, each followed by its proof."""
    count = plan.blocks
    filled: Words = np.empty((count, WORDS_PER_BLOCK), np.uint64)
    spare: Words = np.empty(WORDS_PER_BLOCK, np.uint64)
    filled[:2] = first_blocks(plan.seed)
    before = filled[1]
    for index in _told_on(count - 2, progress):
        into = filled[index + 2]
        mix(before, filled[partner(index + 2, before)], into, spare)
        before = into
    tree = Tree([leaf_digest(index, block) for index, block in enumerate(filled.view(np.uint8))])
    pieces = [tree.root]
    hashed = walk_start(plan, tree.root)
    for _ in range(plan.samples):
        index = walk_index(plan, hashed)
        hashed = walk_on(hashed, filled[index].tobytes())
        for shown in (index, index - 1, partner(index, filled[index - 1])):
            pieces += [filled[shown].tobytes(), tree.proof(shown)]
    return b"".join(pieces)


def _told_on(steps: int, progress: Progress) -> Iterator[int]:
    every = max(1, steps // PROGRESS_STEPS)
    for step in range(steps):
        yield step
        if step % every == 0:
            progress(step)
