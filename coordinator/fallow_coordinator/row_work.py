"""Packs and compares single rows: on the spot where all of them are inline payloads, else by the blob service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, pack_selection
from fallow.session import BlobReference
from fallow_coordinator.core.events import PackedCandidate
from fallow_coordinator.core.row_plans import ComparePlan, PackSource, RowsPlan
from fallow_coordinator.ports import RowSource, SingleRows

Payload = Callable[[Digest], bytes | None]


class RowWork:
    """Both ways, one answer."""

    def __init__(self, single_rows: SingleRows | None) -> None:
        """`single_rows` is the blob service; None: rows that are there can be neither packed nor compared."""
        self._single_rows = single_rows

    def compared_inline(self, plan: ComparePlan, payload: Payload) -> tuple[bool, ...]:
        """Whether each pair is the same bytes, from payloads alone. Raises BLOB_UNKNOWN, ROW_BLOCK_MALFORMED."""
        blocks = [_block(source, payload) for source in plan.sources]
        return tuple(_row(blocks, *left) == _row(blocks, *right) for left, right in plan.pairs)

    def packed_inline(
        self, plans: Sequence[RowsPlan], payload: Payload, nonce: Callable[[], bytes]
    ) -> tuple[tuple[PackedCandidate, ...], Mapping[Digest, bytes]]:
        """Candidates packed from payloads alone, and their blocks. Raises as `compared_inline`, and LIMIT_EXCEEDED."""
        packed: list[PackedCandidate] = []
        payloads: dict[Digest, bytes] = {}
        for plan in plans:
            blocks = [_block(source, payload) for source in plan.sources]
            block = pack_selection(blocks, [(source, row, row + 1) for source, row in plan.places], nonce())
            if len(block) > INLINE_PAYLOAD_BYTES_MAX:
                raise FallowError(
                    Reason.LIMIT_EXCEEDED,
                    f"inline rows of candidates take {len(block)} bytes",
                    field="candidates",
                    limit=f"{INLINE_PAYLOAD_BYTES_MAX} bytes",
                )
            digest = digest_of(block)
            payloads[digest] = block
            blob = BlobReference(digest, len(block))
            packed.append(PackedCandidate(blob, True, plan.rows, plan.class_numbers))
        return tuple(packed), payloads

    async def compared(self, plan: ComparePlan, payload: Payload) -> tuple[bool, ...]:
        """The same by the blob service. Raises what `SingleRows` raises."""
        return await self._service().compare(sources=_sources(plan.sources, payload), pairs=plan.pairs)

    async def packed(
        self, plans: Sequence[RowsPlan], payload: Payload, nonce: Callable[[], bytes]
    ) -> tuple[PackedCandidate, ...]:
        """Candidates packed by the blob service. Raises what `SingleRows` raises."""
        made: list[PackedCandidate] = []
        for plan in plans:
            sources = _sources(plan.sources, payload)
            digest, length_bytes = await self._service().pack_rows(sources=sources, rows=plan.places, nonce=nonce())
            blob = BlobReference(digest, length_bytes)
            made.append(PackedCandidate(blob, False, plan.rows, plan.class_numbers))
        return tuple(made)

    def _service(self) -> SingleRows:
        if self._single_rows is None:
            raise FallowError(Reason.COORDINATOR_UNREACHABLE, "there is no blob service that handles single rows")
        return self._single_rows


def _row(blocks: Sequence[RowBlock], source: int, row: int) -> memoryview:
    if not 0 <= row < len(blocks[source]):
        raise FallowError(Reason.FIELD_INVALID, f"row {row} is not in its block", field="row")
    return blocks[source][row]


def _block(source: PackSource, payload: Payload) -> RowBlock:
    return RowBlock.parse(_payload(source.digest, payload))


def _payload(digest: Digest, payload: Payload) -> bytes:
    data = payload(digest)
    if data is None:
        raise FallowError(Reason.BLOB_UNKNOWN, f"inline block {digest.hex()[:16]}… is not in the journal")
    return data


def _sources(sources: Sequence[PackSource], payload: Payload) -> list[RowSource]:
    return [
        RowSource(
            BlobReference(source.digest, source.length_bytes),
            _payload(source.digest, payload) if source.inline else b"",
        )
        for source in sources
    ]
