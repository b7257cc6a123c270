"""Single rows of many blocks: packed in any order, or compared byte by byte. Nothing is decoded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Final, NamedTuple

from fallow.errors import FallowError, Reason
from fallow.ids import Digest, digest_of
from fallow.limits import COMPARED_ROWS_MAX, COMPARED_SOURCES_MAX, INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, Span
from fallow.v1 import blob_service_pb2
from fallow.wire.blob import reference_from_message
from fallow_coordinator.blobs.packs import Source, SourceBlocks

_NO_ROW: Final = "sources[{source}] has no row {row}"


class RowPlace(NamedTuple):
    """One row of one source."""

    source: int
    row: int


def sources_of(messages: Sequence[blob_service_pb2.RowSource]) -> list[Source]:
    """What a request names as sources. Raises LIMIT_EXCEEDED, FIELD_MISSING, FIELD_INVALID, ROW_BLOCK_MALFORMED."""
    if not 1 <= len(messages) <= COMPARED_SOURCES_MAX:
        raise _counted(len(messages), "sources", COMPARED_SOURCES_MAX)
    sources: list[Source] = []
    for index, message in enumerate(messages):
        field = f"sources[{index}]"
        match message.WhichOneof("place"):
            case "blob":
                sources.append(reference_from_message(message.blob, f"{field}.blob"))
            case "inline_block":
                if len(message.inline_block) > INLINE_PAYLOAD_BYTES_MAX:
                    raise _counted(len(message.inline_block), f"{field}.inline_block", INLINE_PAYLOAD_BYTES_MAX)
                sources.append(RowBlock.parse(message.inline_block))
            case _:
                raise FallowError(Reason.FIELD_MISSING, "a source that is no block", field=field)
    return sources


def spans_of(rows: Sequence[blob_service_pb2.RowPlace]) -> list[Span]:
    """The rows to pack, each a span of its own. Raises LIMIT_EXCEEDED."""
    if not 1 <= len(rows) <= COMPARED_ROWS_MAX:
        raise _counted(len(rows), "rows", COMPARED_ROWS_MAX)
    return [Span(row.source, row.row, row.row + 1) for row in rows]


def pairs_of(messages: Sequence[blob_service_pb2.RowPair]) -> list[tuple[RowPlace, RowPlace]]:
    """The pairs to compare. Raises LIMIT_EXCEEDED."""
    if not 1 <= len(messages) <= COMPARED_ROWS_MAX:
        raise _counted(len(messages), "pairs", COMPARED_ROWS_MAX)
    return [
        (RowPlace(pair.left.source, pair.left.row), RowPlace(pair.right.source, pair.right.row)) for pair in messages
    ]


async def equal_rows(
    sources: Sequence[Source],
    pairs: Sequence[tuple[RowPlace, RowPlace]],
    *,
    blocks: SourceBlocks,
    threads: Executor,
) -> list[bool]:
    """Whether each pair is the same row bytes; one source is in memory at a time, beside those that are cached.

    Raises BLOB_UNKNOWN, ROW_BLOCK_MALFORMED, FIELD_INVALID for a row that is not there, and SCHEMA_MISMATCH for a pair
    of different schemas: equal bytes would mean nothing.
    """
    wanted: list[set[int]] = [set() for _ in sources]
    for pair in pairs:
        for number, row in pair:
            if not 0 <= number < len(sources):
                raise FallowError(
                    Reason.FIELD_INVALID,
                    f"source {number} does not exist",
                    field="pairs",
                    limit=f"{len(sources)} sources",
                )
            wanted[number].add(row)
    loop = asyncio.get_running_loop()
    digests: list[dict[int, Digest]] = []
    schemas: list[Digest] = []
    for index, source in enumerate(sources):
        if not wanted[index]:
            digests.append({})
            schemas.append(Digest(b""))
            continue
        block = await blocks.block(source)
        digests.append(await loop.run_in_executor(threads, _digests, block, sorted(wanted[index]), index))
        schemas.append(block.schema_digest)
    for number, (left, right) in enumerate(pairs):
        if schemas[left.source] != schemas[right.source]:
            raise FallowError(Reason.SCHEMA_MISMATCH, "rows of different schemas", field=f"pairs[{number}]")
    return [digests[left.source][left.row] == digests[right.source][right.row] for left, right in pairs]


def _digests(block: RowBlock, rows: Sequence[int], source: int) -> dict[int, Digest]:
    found: dict[int, Digest] = {}
    for row in rows:
        if not 0 <= row < len(block):
            raise FallowError(
                Reason.FIELD_INVALID,
                _NO_ROW.format(source=source, row=row),
                field=f"sources[{source}]",
                limit=f"{len(block)} rows",
            )
        found[row] = digest_of(block[row])
    return found


def _counted(count: int, field: str, most: int) -> FallowError:
    return FallowError(Reason.LIMIT_EXCEEDED, f"{count} in {field}", field=field, limit=f"1 to {most}")
