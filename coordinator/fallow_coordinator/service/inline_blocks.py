"""Row blocks that travel inside messages: their frame is looked at here, as the blob service does for uploads."""

from __future__ import annotations

from itertools import pairwise

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock
from fallow.session import BlobReference
from fallow_coordinator.core.commands import StoredBlob


def inspected_block(data: bytes, named: BlobReference, field: str) -> tuple[RowBlock, StoredBlob]:
    """The block in `data`, which must be the one that is named, and what its frame says; rows are not decoded.

    Raises LIMIT_EXCEEDED, DIGEST_MISMATCH or what parsing the frame raises.
    """
    if len(data) > INLINE_PAYLOAD_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"an inline block of {len(data)} bytes",
            field=field,
            limit=f"{INLINE_PAYLOAD_BYTES_MAX} bytes; larger ones are uploaded",
        )
    if len(data) != named.length_bytes or digest_of(data) != named.digest:
        raise FallowError(Reason.DIGEST_MISMATCH, "the inline block is not the one that is named", field=field)
    block = RowBlock.parse(data)
    return block, StoredBlob(
        blob=named,
        rows=len(block),
        root=block.root(),
        schema_digest=block.schema_digest,
        size_feature_sums=block.size_feature_sums,
        rows_failed=sum(start == end for start, end in pairwise(block.offsets)),
    )
