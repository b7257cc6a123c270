"""Packs a task's rows on the spot when all of them are inline payloads: then a job's rows never leave the journal."""

from __future__ import annotations

from collections.abc import Callable

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack_selection
from fallow_coordinator.core.questions import PackPlan


def pack_inline(plan: PackPlan, payload: Callable[[Digest], bytes | None], nonce: bytes) -> bytes:
    """The packed block of an inline plan; `payload` gives the bytes of a source.

    Raises BLOB_UNKNOWN when a source's payload is gone, LIMIT_EXCEEDED when the result is too large to be inline, and
    what `pack_selection` raises.
    """
    assert plan.inline, "only payloads can be packed here"
    sources: list[RowBlock] = []
    for source in plan.sources:
        data = payload(source.digest)
        if data is None:
            raise FallowError(Reason.BLOB_UNKNOWN, f"inline block {source.digest.hex()[:16]}… is not in the journal")
        sources.append(RowBlock.parse(data))
    block = pack_selection(sources, [(source, first, first + rows) for source, first, rows in plan.spans], nonce)
    if len(block) > INLINE_PAYLOAD_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"inline rows of one task take {len(block)} bytes",
            field="blocks",
            limit=f"{INLINE_PAYLOAD_BYTES_MAX} bytes",
            hint="upload the dataset's blocks",
        )
    return block
