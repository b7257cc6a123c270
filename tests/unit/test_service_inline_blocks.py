"""Blocks that travel inside messages, and the commitments that name them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, LeaseId, digest_of
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack
from fallow.session import BlobReference, Cause, Commitment, RowFailure
from fallow_coordinator.service.inline_blocks import inspected_block
from fallow_coordinator.service.workers import checked_inline_output

SCHEMA = Digest(b"s" * 32)


def reference(data: bytes) -> BlobReference:
    return BlobReference(digest_of(data), len(data))


def commitment(rows: list[bytes], failures: tuple[RowFailure, ...] = ()) -> Commitment:
    data = pack(SCHEMA, rows, [], b"n" * 16)
    block = RowBlock.parse(data)
    return Commitment(
        LeaseId("lease-a"), 1, block.root(), len(rows), reference(data), failures=failures, inline_output=data
    )


def test_frame_gives_rows_root_schema_features_and_failed_rows() -> None:
    data = pack(SCHEMA, [b"abc", b"", b"de"], [(3,), (0,), (2,)], b"n" * 16)
    block, stored = inspected_block(data, reference(data), "here")
    assert (stored.rows, stored.rows_failed, stored.size_feature_sums) == (3, 1, (5,))
    assert (stored.root, stored.schema_digest) == (block.root(), SCHEMA)


@pytest.mark.parametrize(
    ("data", "named", "reason"),
    [
        (b"x" * (INLINE_PAYLOAD_BYTES_MAX + 1), None, Reason.LIMIT_EXCEEDED),
        (b"x" * 100, BlobReference(Digest(b"d" * 32), 100), Reason.DIGEST_MISMATCH),
        (b"x" * 100, BlobReference(digest_of(b"x" * 100), 99), Reason.DIGEST_MISMATCH),
        (b"x" * 100, None, Reason.ROW_BLOCK_MALFORMED),
    ],
)
def test_wrong_blocks_are_refused(data: bytes, named: BlobReference | None, reason: Reason) -> None:
    with pytest.raises(FallowError) as caught:
        inspected_block(data, named or reference(data), "here")
    assert caught.value.reason is reason


def test_honest_commitment_is_taken() -> None:
    failed = RowFailure(1, Cause.ROW, "too long")
    stored = checked_inline_output(commitment([b"abc", b"", b"de"], (failed,)))
    assert stored.rows_failed == 1


@pytest.mark.parametrize(
    ("changes", "reason", "field"),
    [
        ({"rows": 3}, Reason.FIELD_INVALID, "commitment.rows"),
        ({"output_root": Digest(b"r" * 32)}, Reason.ROOT_MISMATCH, "commitment.output_root"),
        ({"failures": (RowFailure(0, Cause.ROW, "x"),)}, Reason.FIELD_INVALID, "commitment.failures"),
        ({"failures": (RowFailure(2, Cause.ROW, "x"),)}, Reason.FIELD_INVALID, "commitment.failures"),
    ],
)
def test_lying_commitments_are_refused(changes: dict[str, object], reason: Reason, field: str) -> None:
    with pytest.raises(FallowError) as caught:
        checked_inline_output(replace(commitment([b"abc", b"de"]), **changes))  # type: ignore[arg-type]
    assert (caught.value.reason, caught.value.field) == (reason, field)
