"""Packing stored blocks gives what packing them in memory gives, however many sources there are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fallow.errors import FallowError, Reason
from fallow.ids import digest_of
from fallow.row_block import RowBlock, Span, pack, pack_selection
from fallow.session import BlobReference
from fallow_coordinator.blobs.packs import SourceBlocks, pack_blocks
from fallow_coordinator.blobs.storage import MemoryStorage

NONCE = bytes(16)
SCHEMA = digest_of(b"schema")


def block_of(seed: int, rows: int = 20) -> bytes:
    chance = random.Random(seed)
    data = [chance.randbytes(chance.randrange(0, 50)) for _ in range(rows)]
    return pack(SCHEMA, data, [(len(row), seed) for row in data], NONCE)


BLOCKS = [block_of(seed) for seed in range(4)]
REFERENCES = [BlobReference(digest_of(data), len(data)) for data in BLOCKS]


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


async def stored_blocks() -> MemoryStorage:
    storage = MemoryStorage()
    for data in BLOCKS:
        await storage.put_bytes(digest_of(data), data)
    return storage


@st.composite
def selections(draw: st.DrawFn) -> list[Span]:
    spans: list[Span] = []
    for _ in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, 19))
        spans.append(Span(draw(st.integers(0, 3)), start, draw(st.integers(start + 1, 20))))
    return spans


@settings(max_examples=50, deadline=None)
@given(selections(), st.sampled_from([1 << 20, 0]))
async def test_stored_packs_equal_packs_in_memory(spans: list[Span], cache_bytes: int) -> None:
    storage = await stored_blocks()
    with ThreadPoolExecutor(1) as threads:
        blocks = SourceBlocks(storage, threads, bytes_max=cache_bytes)
        blob, rows = await pack_blocks(
            sources=REFERENCES, spans=spans, nonce=NONCE, blocks=blocks, storage=storage, threads=threads
        )
    expected = pack_selection([RowBlock.parse(data) for data in BLOCKS], spans, NONCE)
    assert blob == BlobReference(digest_of(expected), len(expected))
    assert rows == sum(end - start for _, start, end in spans)
    assert bytes(await storage.read(blob.digest, offset=0, length=blob.length_bytes)) == expected


@pytest.mark.parametrize("cache_bytes", [1 << 20, 0])
@pytest.mark.parametrize("span", [Span(0, 0, 21), Span(0, 5, 5), Span(0, 7, 3), Span(4, 0, 1)])
async def test_spans_that_do_not_exist_are_refused(threads: ThreadPoolExecutor, span: Span, cache_bytes: int) -> None:
    storage = await stored_blocks()
    blocks = SourceBlocks(storage, threads, bytes_max=cache_bytes)
    spans = [Span(0, 0, 1), span]
    with pytest.raises(FallowError) as caught:
        await pack_blocks(
            sources=REFERENCES,
            spans=spans,
            nonce=NONCE,
            blocks=blocks,
            storage=storage,
            threads=threads,
        )
    assert caught.value.reason is Reason.FIELD_INVALID


async def test_blocks_read_last_are_kept_within_the_bound(threads: ThreadPoolExecutor) -> None:
    storage = await stored_blocks()
    blocks = SourceBlocks(storage, threads, bytes_max=len(BLOCKS[0]) + len(BLOCKS[1]))
    first = await blocks.block(REFERENCES[0])
    assert await blocks.block(REFERENCES[0]) is first
    for reference in REFERENCES[1:]:
        await blocks.block(reference)
    await storage.delete(REFERENCES[0].digest)
    with pytest.raises(FallowError) as caught:
        await blocks.block(REFERENCES[0])
    assert caught.value.reason is Reason.BLOB_UNKNOWN
