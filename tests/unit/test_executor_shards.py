"""Cutting leases and joining outputs changes no row, no slot and no neighbour."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fallow.ids import Digest, LeaseId
from fallow.row_block import RowBlock, pack
from fallow.session import Cause, NodeRows, RowFailure, TaskKind, Usage
from fallow_worker.engine.frames import FrameError
from fallow_worker.engine.protocol import ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow_worker.executor import WorkFailed
from fallow_worker.executor.ray_messages import FromDriver, ToDriver, encode, end_of, read_frame, start_of, work_of
from fallow_worker.executor.shards import (
    SHARD_BATCHES_MIN,
    SHARDS_MAX,
    cut,
    join,
    join_failures,
    join_usage,
    joined_runs,
    shard_ranges,
    weighted_ranges,
)
from fallow_worker.ports import LoadedBundle, Outcome, Work

DIGEST = Digest(b"s" * 32)
NONCE = bytes(range(16))
COUNTS = st.integers(1, 5000)
BATCHES = st.integers(1, 64)


@given(st.integers(1, 200_000), BATCHES, st.integers(1, 64))
def test_shards_cover_every_row_once_at_whole_batches(rows: int, batch: int, seats: int) -> None:
    ranges = shard_ranges(rows, batch_rows=batch, seats=seats)
    assert (ranges[0].start, ranges[-1].end) == (0, rows)
    assert all(before.end == after.start for before, after in pairwise(ranges))
    assert all(len(part) >= 1 and part.start % batch == 0 for part in ranges)
    assert len(ranges) <= SHARDS_MAX


@given(st.integers(1, 5000), st.integers(1, 16))
def test_no_child_stands_idle_and_the_last_shards_are_short(batches: int, seats: int) -> None:
    lengths = [len(part) for part in shard_ranges(batches, batch_rows=1, seats=seats)]
    assert max(lengths) <= max(-(-batches // seats), 2 * SHARD_BATCHES_MIN)
    if batches >= seats:
        assert len(lengths) >= seats // 2 + 1
    assert lengths[-1] < 2 * SHARD_BATCHES_MIN


@given(COUNTS, BATCHES, st.lists(st.integers(1, 64), min_size=1, max_size=8))
def test_weighted_ranges_cover_every_row_once_at_whole_batches(rows: int, batch: int, weights: list[int]) -> None:
    ranges = weighted_ranges(rows, batch_rows=batch, weights=weights)
    assert len(ranges) == len(weights)
    assert [row for part in ranges for row in range(part.start, part.end)] == list(range(rows))
    assert all(part.start % batch == 0 for part in ranges if len(part))


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=60), BATCHES, st.integers(1, 4), st.booleans())
def test_a_block_cut_and_joined_is_the_same_bytes(rows: list[bytes], batch: int, seats: int, featured: bool) -> None:
    features = [(len(row),) for row in rows] if featured else []
    block = pack(DIGEST, rows, features, NONCE)
    parsed = RowBlock.parse(block)
    ranges = shard_ranges(len(rows), batch_rows=batch, seats=seats)
    assert join([cut(parsed, part, NONCE) for part in ranges], NONCE) == block


def test_failures_keep_their_rows_and_their_number_is_bounded() -> None:
    many = [RowFailure(row, Cause.ROW, "no") for row in range(200)]
    joined = join_failures([(0, many), (1000, many)])
    assert len(joined) == ROW_FAILURES_LISTED_PER_TASK_MAX
    assert (joined[0].row, joined[200].row) == (0, 1000)


def test_usage_adds_up_but_for_the_clock_and_the_peak() -> None:
    parts = [Usage(wall_microseconds=5, cpu_microseconds=7, memory_bytes_peak=100), Usage(9, 1, 50)]
    joined = join_usage(parts, wall_microseconds=12)
    assert (joined.wall_microseconds, joined.cpu_microseconds, joined.memory_bytes_peak) == (12, 8, 100)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12))
def test_runs_of_nodes_keep_every_row_and_join_neighbours(parts: list[tuple[int, int]]) -> None:
    told = [node for node, rows in parts for _ in range(rows)]
    runs = joined_runs(NodeRows(node, rows) for node, rows in parts)
    assert [run.node for run in runs for _ in range(run.rows)] == told
    assert all(run.rows for run in runs)
    assert all(one.node != other.node for one, other in pairwise(runs))
    usage = join_usage([], wall_microseconds=1, nodes=runs)
    assert usage.node == (told[0] if told else 0)
    assert usage.nodes == (runs if len(runs) > 1 else ()), "one node needs no list"


WORK = Work(
    lease_id=LeaseId("lease-1"),
    kind=TaskKind.MAP,
    bundle=LoadedBundle(DIGEST, b"manifest", {"a": "/x/a", "b": "/x/b"}, 4, True, 123),
    input_block=b"\x00\xffblock",
    rows=3,
    nonce=NONCE,
    output_bytes_max=1000,
    runtime_max_ms=5,
    buckets=(1, 2, 3),
    slots=(0, 1, 0),
)


async def received(data: bytes, hint: object) -> tuple[object, bytes] | None:
    reader = asyncio.StreamReader()
    reader.feed_data(data)
    reader.feed_eof()
    return await read_frame(reader, hint)


async def test_a_lease_reaches_the_driver_as_it_was() -> None:
    frame = await received(b"".join(encode(start_of(7, WORK), WORK.input_block)), ToDriver)
    assert frame is not None
    start, body = frame
    assert work_of(start, body) == WORK  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "end",
    [
        Outcome(b"out", (RowFailure(2, Cause.ROW, "bad"),), Usage(1, 2, 3, 4.5), "class"),
        WorkFailed(Cause.PROGRAM, "it crashed"),
    ],
)
async def test_an_end_comes_back_as_it_was(end: Outcome | WorkFailed) -> None:
    message, body = end_of(9, end)
    assert await received(b"".join(encode(message, body)), FromDriver) == (message, body)


async def test_a_frame_cut_short_is_an_end_and_junk_is_an_error() -> None:
    whole = b"".join(encode(start_of(7, WORK), WORK.input_block))
    assert await received(whole[:-1], ToDriver) is None
    assert await received(b"", ToDriver) is None
    with pytest.raises(FrameError):
        await received(b"\xff" * 100, ToDriver)
    with pytest.raises(FrameError):
        await received(whole.replace(b'"StartWork"', b'"StopWork!"'), ToDriver)
