"""Cutting a lease into shards and joining what came back: slots and neighbours of every row stay as they were."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from fallow.row_block import RowBlock, pack_selection
from fallow.session import NodeRows, RowFailure, Usage
from fallow_worker.engine.protocol import ROW_FAILURES_LISTED_PER_TASK_MAX

SHARDS_MAX: Final = 256
"""Shards of one lease on one node."""
SHARD_BATCHES_MIN: Final = 8
"""Fewer canonical batches than this are not worth a shard of their own, unless a child would stand idle."""


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows `start` up to, not including, `end` of a block."""

    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


def shard_ranges(rows: int, *, batch_rows: int, seats: int) -> tuple[RowRange, ...]:
    """Ranges that cover `rows` in order, each but the last a whole number of canonical batches.

    Row i of a block runs in slot i mod b, so a cut at a multiple of b leaves every row its slot and its neighbours.
    Each shard takes half of what would be left for each of the `seats` children, so that the last ones are short and
    children of unequal speed end together (guided self-scheduling, Polychronopoulos and Kuck 1987).
    """
    assert rows >= 1 and batch_rows >= 1 and seats >= 1
    left = -(-rows // batch_rows)
    least = min(SHARD_BATCHES_MIN, -(-left // seats))
    ranges: list[RowRange] = []
    start = 0
    while left:
        batches = min(left, max(least, -(-left // (2 * seats))))
        if left - batches < least or len(ranges) == SHARDS_MAX - 1:
            batches = left if len(ranges) >= seats - 1 else batches
        end = min(rows, start + batches * batch_rows)
        ranges.append(RowRange(start, end))
        left -= batches
        start = end
    return tuple(ranges)


def weighted_ranges(rows: int, *, batch_rows: int, weights: Sequence[int]) -> tuple[RowRange, ...]:
    """One range for each weight, in order and in proportion, cut at canonical batches; empty ones are left out as
    zero-length ranges."""
    assert rows >= 1 and batch_rows >= 1 and weights and all(weight >= 1 for weight in weights)
    batches = -(-rows // batch_rows)
    total = sum(weights)
    ranges: list[RowRange] = []
    before = 0
    for weight in weights:
        start = min(rows, round(batches * before / total) * batch_rows)
        before += weight
        end = min(rows, round(batches * before / total) * batch_rows)
        ranges.append(RowRange(start, end))
    return tuple(ranges)


def cut(block: RowBlock, rows: RowRange, nonce: bytes) -> bytes:
    """The block of some rows of `block`."""
    if rows.start == 0 and rows.end == len(block):
        return bytes(block.data)
    return pack_selection((block,), ((0, rows.start, rows.end),), nonce)


def join(blocks: Sequence[bytes], nonce: bytes) -> bytes:
    """One block of the rows of all `blocks` in order. Raises what `row_block.pack_selection` raises."""
    if len(blocks) == 1:
        return blocks[0]
    parsed = [RowBlock.parse(block) for block in blocks]
    return pack_selection(parsed, [(index, 0, len(block)) for index, block in enumerate(parsed)], nonce)


def join_failures(parts: Sequence[tuple[int, Sequence[RowFailure]]]) -> tuple[RowFailure, ...]:
    """Failures of the whole block from (first row, failures) of each part, in row order, as many as are listed."""
    joined = [
        RowFailure(start + failure.row, failure.cause, failure.reason) for start, part in parts for failure in part
    ]
    return tuple(joined[:ROW_FAILURES_LISTED_PER_TASK_MAX])


def joined_runs(runs: Iterable[NodeRows]) -> tuple[NodeRows, ...]:
    """The same rows by node, neighbours of one node as one run."""
    joined: list[NodeRows] = []
    for run in runs:
        if joined and joined[-1].node == run.node:
            joined[-1] = NodeRows(run.node, joined[-1].rows + run.rows)
        elif run.rows:
            joined.append(run)
    return tuple(joined)


def join_usage(parts: Sequence[Usage], *, wall_microseconds: int, nodes: Sequence[NodeRows] = ()) -> Usage:
    """What the parts used together in that much time on the clock; `nodes` did the rows, else node 0."""
    runs = joined_runs(nodes)
    return Usage(
        wall_microseconds=wall_microseconds,
        cpu_microseconds=sum(part.cpu_microseconds for part in parts),
        memory_bytes_peak=max((part.memory_bytes_peak for part in parts), default=0),
        energy_joules=sum(part.energy_joules for part in parts),
        tokens=sum(part.tokens for part in parts),
        node=runs[0].node if runs else 0,
        nodes=runs if len(runs) > 1 else (),
    )
