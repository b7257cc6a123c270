"""Single rows of many blocks: packed in any order, compared by their bytes alone."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.limits import COMPARED_ROWS_MAX, COMPARED_SOURCES_MAX, INLINE_PAYLOAD_BYTES_MAX
from fallow.row_block import RowBlock, Span, pack
from fallow.session import BlobReference
from fallow.v1 import blob_pb2, blob_service_pb2
from fallow_coordinator.blobs.packs import Source, SourceBlocks, pack_blocks
from fallow_coordinator.blobs.single_rows import RowPlace, equal_rows, pairs_of, sources_of, spans_of
from fallow_coordinator.blobs.storage import MemoryStorage

NONCE = bytes(16)
SCHEMA = digest_of(b"schema")
ROWS = 12


def block_of(seed: int, schema: bytes = b"schema") -> bytes:
    """Rows of at most two letters, so that many are equal across blocks, and some have no bytes."""
    chance = random.Random(seed)
    rows = [bytes(chance.choices(b"ab", k=chance.randrange(3))) for _ in range(ROWS)]
    return pack(digest_of(schema), rows, [(seed,)] * ROWS, NONCE)


BLOCKS = [block_of(seed) for seed in range(4)]


class Shelf:
    """Blocks 0 and 1 stored, 2 and 3 brought along."""

    def __init__(self, threads: ThreadPoolExecutor, cache_bytes: int) -> None:
        self.threads = threads
        self.storage = MemoryStorage()
        self.blocks = SourceBlocks(self.storage, threads, bytes_max=cache_bytes)
        stored = [BlobReference(digest_of(data), len(data)) for data in BLOCKS[:2]]
        self.sources: list[Source] = [*stored, *(RowBlock.parse(data) for data in BLOCKS[2:])]

    async def fill(self) -> Shelf:
        for data in BLOCKS[:2]:
            await self.storage.put_bytes(digest_of(data), data)
        return self


@pytest.fixture
async def shelf() -> AsyncIterator[Shelf]:
    with ThreadPoolExecutor(1) as threads:
        yield await Shelf(threads, 1 << 20).fill()


places = st.builds(RowPlace, st.integers(0, 3), st.integers(0, ROWS - 1))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(places, places), min_size=1, max_size=20), st.sampled_from([1 << 20, 0]))
async def test_rows_are_equal_when_their_bytes_are(pairs: list[tuple[RowPlace, RowPlace]], cache_bytes: int) -> None:
    parsed = [RowBlock.parse(data) for data in BLOCKS]
    with ThreadPoolExecutor(1) as threads:
        shelf = await Shelf(threads, cache_bytes).fill()
        equal = await equal_rows(shelf.sources, pairs, blocks=shelf.blocks, threads=threads)
    assert equal == [bytes(parsed[a.source][a.row]) == bytes(parsed[b.source][b.row]) for a, b in pairs]


@settings(max_examples=50, deadline=None)
@given(st.lists(places, min_size=1, max_size=20), st.sampled_from([1 << 20, 0]))
async def test_packed_rows_stand_in_the_order_asked_for(rows: list[RowPlace], cache_bytes: int) -> None:
    parsed = [RowBlock.parse(data) for data in BLOCKS]
    with ThreadPoolExecutor(1) as threads:
        shelf = await Shelf(threads, cache_bytes).fill()
        blob, count = await pack_blocks(
            sources=shelf.sources,
            spans=[Span(source, row, row + 1) for source, row in rows],
            nonce=NONCE,
            blocks=shelf.blocks,
            storage=shelf.storage,
            threads=threads,
        )
        packed = RowBlock.parse(await shelf.storage.read(blob.digest, offset=0, length=blob.length_bytes))
    assert count == len(packed) == len(rows)
    assert [bytes(row) for row in packed] == [bytes(parsed[source][row]) for source, row in rows]
    assert packed.schema_digest == SCHEMA


@pytest.mark.parametrize("place", [RowPlace(0, ROWS), RowPlace(2, 99), RowPlace(4, 0)])
async def test_rows_that_are_not_there_are_refused(shelf: Shelf, place: RowPlace) -> None:
    with pytest.raises(FallowError) as caught:
        await equal_rows(shelf.sources, [(RowPlace(0, 0), place)], blocks=shelf.blocks, threads=shelf.threads)
    assert caught.value.reason is Reason.FIELD_INVALID


async def test_what_is_no_block_or_not_there_is_refused_with_its_reason(shelf: Shelf) -> None:
    await shelf.storage.put_bytes(digest_of(b"not a block" * 20), b"not a block" * 20)
    sources: dict[Reason, Source] = {
        Reason.BLOB_UNKNOWN: BlobReference(digest_of(b"nobody has this"), 100),
        Reason.ROW_BLOCK_MALFORMED: BlobReference(digest_of(b"not a block" * 20), 220),
        Reason.SCHEMA_MISMATCH: RowBlock.parse(block_of(0, b"another")),
    }
    for reason, source in sources.items():
        pair = (RowPlace(0, 0), RowPlace(1, 0))
        with pytest.raises(FallowError) as caught:
            await equal_rows([shelf.sources[0], source], [pair], blocks=shelf.blocks, threads=shelf.threads)
        assert caught.value.reason is reason


def test_requests_have_limits_and_say_so() -> None:
    blob = blob_service_pb2.RowSource(blob=blob_pb2.BlobReference(digest=bytes(32), length_bytes=1))
    large = blob_service_pb2.RowSource(inline_block=bytes(INLINE_PAYLOAD_BYTES_MAX + 1))
    place, pair = blob_service_pb2.RowPlace(), blob_service_pb2.RowPair()
    for call, reason in (
        (lambda: sources_of([]), Reason.LIMIT_EXCEEDED),
        (lambda: sources_of([blob] * (COMPARED_SOURCES_MAX + 1)), Reason.LIMIT_EXCEEDED),
        (lambda: sources_of([large]), Reason.LIMIT_EXCEEDED),
        (lambda: sources_of([blob_service_pb2.RowSource()]), Reason.FIELD_MISSING),
        (lambda: sources_of([blob_service_pb2.RowSource(inline_block=b"short")]), Reason.ROW_BLOCK_MALFORMED),
        (lambda: spans_of([place] * (COMPARED_ROWS_MAX + 1)), Reason.LIMIT_EXCEEDED),
        (lambda: pairs_of([pair] * (COMPARED_ROWS_MAX + 1)), Reason.LIMIT_EXCEEDED),
        (lambda: pairs_of([]), Reason.LIMIT_EXCEEDED),
    ):
        with pytest.raises(FallowError) as caught:
            call()
        assert caught.value.reason is reason
