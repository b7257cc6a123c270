"""Packing rows of stored blocks into fresh ones, with the blocks read last kept at hand."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import BLOCK_BYTES_MAX
from fallow.row_block import NONCE_BYTES, RowBlock, Span, pack_selection
from fallow.session import BlobReference
from fallow_coordinator.blobs.storage import BlobStorage, unknown

Source = BlobReference | RowBlock
"""A stored block, or one that came with the request."""


class SourceBlocks:
    """Stored row blocks, parsed; the ones read last stay, up to a bound in bytes."""

    def __init__(self, storage: BlobStorage, threads: Executor, *, bytes_max: int) -> None:
        """`threads` parse."""
        self._storage = storage
        self._threads = threads
        self.bytes_max = bytes_max
        """How much is kept."""
        self._bytes = 0
        self._blocks: OrderedDict[Digest, RowBlock] = OrderedDict()

    async def block(self, blob: Source) -> RowBlock:
        """The block of a source. Raises BLOB_UNKNOWN, or ROW_BLOCK_MALFORMED when the blob is none."""
        if isinstance(blob, RowBlock):
            return blob
        block = self._blocks.get(blob.digest)
        if block is not None and block.nbytes == blob.length_bytes:
            self._blocks.move_to_end(blob.digest)
            return block
        size = blob.length_bytes
        if size > BLOCK_BYTES_MAX:
            raise FallowError(
                Reason.BLOCK_TOO_LARGE, f"a source of {size} bytes", field="sources", limit=f"{BLOCK_BYTES_MAX} bytes"
            )
        if await self._storage.size(blob.digest) != size:
            raise unknown(blob.digest)
        data = await self._storage.read(blob.digest, offset=0, length=size)
        block = await asyncio.get_running_loop().run_in_executor(self._threads, RowBlock.parse, data)
        self._remember(blob.digest, block)
        return block

    def forget(self, digest: Digest) -> None:
        """Keeps nothing of a block that was deleted."""
        block = self._blocks.pop(digest, None)
        if block is not None:
            self._bytes -= block.nbytes

    def _remember(self, digest: Digest, block: RowBlock) -> None:
        if digest in self._blocks or block.nbytes > self.bytes_max:
            return
        self._blocks[digest] = block
        self._bytes += block.nbytes
        while self._bytes > self.bytes_max:
            _, dropped = self._blocks.popitem(last=False)
            self._bytes -= dropped.nbytes


async def pack_blocks(
    *,
    sources: Sequence[Source],
    spans: Sequence[Span],
    nonce: bytes,
    blocks: SourceBlocks,
    storage: BlobStorage,
    threads: Executor,
) -> tuple[BlobReference, int]:
    """Packs the spans into a fresh stored block; its reference and its rows.

    Raises BLOB_UNKNOWN, FIELD_INVALID, SCHEMA_MISMATCH, DATASET_EMPTY, BLOCK_TOO_LARGE or STORAGE_FULL.
    """
    if len(nonce) != NONCE_BYTES:
        raise FallowError(
            Reason.FIELD_INVALID, f"a nonce of {len(nonce)} bytes", field="nonce", limit=f"{NONCE_BYTES} bytes"
        )
    loop = asyncio.get_running_loop()
    if sum(_stored_bytes(source) for source in sources) <= blocks.bytes_max:
        parts: Sequence[RowBlock] = [await blocks.block(source) for source in sources]
    else:
        parts, spans = await _cut_out(sources, spans, nonce, blocks, threads)

    def packed() -> tuple[bytes, Digest]:
        data = pack_selection(parts, spans, nonce)
        return data, digest_of(data)

    data, digest = await loop.run_in_executor(threads, packed)
    await storage.put_bytes(digest, data)
    return BlobReference(digest, len(data)), sum(span.end - span.start for span in spans)


def _stored_bytes(source: Source) -> int:
    return 0 if isinstance(source, RowBlock) else source.length_bytes


async def _cut_out(
    sources: Sequence[Source],
    spans: Sequence[Span],
    nonce: bytes,
    blocks: SourceBlocks,
    threads: Executor,
) -> tuple[list[RowBlock], list[Span]]:
    """Only the wanted rows of each source, one source in memory at a time, and the spans as they stand there."""
    wanted: list[list[Span]] = [[] for _ in sources]
    rows_before = [0] * len(sources)
    moved: list[Span] = []
    for position, span in enumerate(spans):
        if not 0 <= span.block < len(sources):
            raise FallowError(
                Reason.FIELD_INVALID,
                f"source {span.block} does not exist",
                field=f"spans[{position}].source",
                limit=f"{len(sources)} sources",
            )
        wanted[span.block].append(Span(0, span.start, span.end))
        start = rows_before[span.block]
        rows_before[span.block] = end = start + max(0, span.end - span.start)
        moved.append(Span(span.block, start, end))

    def cut(block: RowBlock, cuts: Sequence[Span]) -> RowBlock:
        return RowBlock.parse(pack_selection([block], cuts, nonce))

    loop = asyncio.get_running_loop()
    parts: list[RowBlock] = []
    renumbered: dict[int, int] = {}
    bytes_left = BLOCK_BYTES_MAX
    for index, (source, cuts) in enumerate(zip(sources, wanted, strict=True)):
        if not cuts:
            continue
        renumbered[index] = len(parts)
        part = await loop.run_in_executor(threads, cut, await blocks.block(source), cuts)
        parts.append(part)
        bytes_left -= len(part.body)
        if bytes_left < 0:
            raise FallowError(
                Reason.BLOCK_TOO_LARGE, "the packed block would be too large", limit=f"{BLOCK_BYTES_MAX} bytes a block"
            )
    return parts, [Span(renumbered[block], start, end) for block, start, end in moved]
