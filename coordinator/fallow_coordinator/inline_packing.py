"""Packs a task's rows on the spot when all of them are inline payloads: then a job's rows never leave the journal."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack_selection
from fallow_coordinator.core.row_plans import PackPlan

BLOCKS_REMEMBERED_MAX: Final = 64
"""Source blocks kept parsed, of at most `INLINE_PAYLOAD_BYTES_MAX` each: a job's tasks are all cut from the same."""


class InlinePacker:
    """Packs from payloads alone; remembers the blocks it packed from last."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[Digest, RowBlock] = OrderedDict()

    def pack(self, plan: PackPlan, payload: Callable[[Digest], bytes | None], nonce: bytes) -> bytes:
        """The packed block of an inline plan; `payload` gives the bytes of a source.

        Raises BLOB_UNKNOWN when a source's payload is gone, LIMIT_EXCEEDED when the result is too large to be inline,
        and what `pack_selection` raises.
        """
        assert plan.inline, "only payloads can be packed here"
        sources = [self._block(source.digest, payload) for source in plan.sources]
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

    def _block(self, digest: Digest, payload: Callable[[Digest], bytes | None]) -> RowBlock:
        block = self._blocks.get(digest)
        if block is not None:
            self._blocks.move_to_end(digest)
            return block
        data = payload(digest)
        if data is None:
            raise FallowError(Reason.BLOB_UNKNOWN, f"inline block {digest.hex()[:16]}… is not in the journal")
        block = self._blocks[digest] = RowBlock.parse(data)
        if len(self._blocks) > BLOCKS_REMEMBERED_MAX:
            self._blocks.popitem(last=False)
        return block
