"""How large the next task of a job is: cut by cost, smaller as the end comes near, never beyond a block."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from fallow.bundle import InspectionReport
from fallow.cost import CostCurve
from fallow.limits import BLOCK_BYTES_MAX, BLOCK_ROWS_MAX, JOB_TASKS_MAX
from fallow_coordinator.core.limits import (
    TASK_BLOCKS_MAX,
    TASK_UNITS_FIRST,
    TASK_UNITS_MIN,
    TASK_UNITS_TARGET,
    UNIT_MICROS,
)
from fallow_coordinator.core.state import Job

_TARGET = TASK_UNITS_TARGET * UNIT_MICROS
_SMALLEST = TASK_UNITS_MIN * UNIT_MICROS
_FIRST = TASK_UNITS_FIRST * UNIT_MICROS
_NANOS_PER_MICRO = 1_000
_ROW_OVERHEAD_BYTES = 64
"""Offsets, size features and length prefixes of an output row, generously."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What rows cost, as inspection found: by the sizes of the rows where it found a curve, else by their bytes."""

    unit_micros_per_row: int
    unit_micros_per_kib: int
    unit_nano_starts: tuple[int, ...] = ()
    """Cost of all blocks before each, and of all at the end, in nano-units; empty: the two numbers above tell."""


def cost_of(job: Job, report: InspectionReport) -> Cost:
    """What the job's rows cost, by what inspection found of its bundle."""
    per_row, per_kib = report.unit_micros_per_row, report.unit_micros_per_kib
    permille = job.cost_permille
    return Cost(-(-per_row * permille // 1_000), -(-per_kib * permille // 1_000), job.unit_nano_starts)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a job's rows lie: block i holds rows `row_starts[i]` up to `row_starts[i + 1]`."""

    row_starts: tuple[int, ...]
    byte_starts: tuple[int, ...]

    def block_of(self, row: int) -> int:
        """Which block holds the row."""
        return bisect_right(self.row_starts, row) - 1

    def bytes_before(self, row: int) -> int:
        """Bytes of all rows before this one, rows of one block taken as equal."""
        return self.share_before(self.byte_starts, row)

    def share_before(self, starts: tuple[int, ...], row: int) -> int:
        """What `starts` counts up to this row, rows of one block taken as equal."""
        if row >= self.row_starts[-1]:
            return starts[-1]
        block = self.block_of(row)
        first, end = self.row_starts[block], self.row_starts[block + 1]
        return starts[block] + (starts[block + 1] - starts[block]) * (row - first) // (end - first)


def unit_nano_starts(curve: CostCurve, block_rows: Iterable[int], block_sizes: Iterable[int]) -> tuple[int, ...]:
    """Cost of all blocks before each, and of all at the end, in nano-units.

    `block_sizes` are the sums of the size feature that the curve follows.
    """
    costs = (curve.rows_unit_nanos(rows, size) for rows, size in zip(block_rows, block_sizes, strict=True))
    return tuple(accumulate(costs, initial=0))


def unit_micros(layout: Layout, cost: Cost, start: int, end: int) -> int:
    """Cost of the rows from `start` up to `end`, in micro-units; at least 1 for any row."""
    if cost.unit_nano_starts:
        starts = cost.unit_nano_starts
        nanos = layout.share_before(starts, end) - layout.share_before(starts, start)
        return max(1, -(-nanos // _NANOS_PER_MICRO))
    size_bytes = layout.bytes_before(end) - layout.bytes_before(start)
    return max(1, cost.unit_micros_per_row * (end - start) + cost.unit_micros_per_kib * size_bytes // 1024)


def cut_size(layout: Layout, cost: Cost, *, start: int, batch_rows: int, leases: int, output_row_bytes: int) -> int:
    """How many rows, from `start` on, the next task takes: at least 1, at most what is left.

    About one in `leases` of what is left, where `leases` is how many the workers are ready to hold, between
    `TASK_UNITS_MIN` and `TASK_UNITS_TARGET` (guided self-scheduling: Polychronopoulos and Kuck, 1987), in whole
    canonical batches but for the end. The first ones are no larger than `TASK_UNITS_FIRST`, so that work begins while
    the next is being packed. Never so much that the packed block could exceed `BLOCK_BYTES_MAX` even if the large rows
    of every block it touches were its own. At least one in `JOB_TASKS_MAX` / 2 of the job unless a block ends before:
    no job has more than `JOB_TASKS_MAX` tasks.
    """
    total = layout.row_starts[-1]
    assert 0 <= start < total and batch_rows > 0 and leases > 0, "there is something to cut"
    left = unit_micros(layout, cost, start, total)
    target = min(_TARGET, max(_SMALLEST, left // leases))
    if start == 0 or unit_micros(layout, cost, 0, start) < leases * _FIRST:
        target = min(target, _FIRST)
    ceiling = _ceiling(layout, start, output_row_bytes)
    least = max(batch_rows, -(-total // (JOB_TASKS_MAX // 2)))
    rows = max(least, _rows_for(layout, cost, start, ceiling, target))
    if ceiling - start - rows < batch_rows:
        return ceiling - start
    whole = rows - rows % batch_rows
    return whole if whole >= least else rows


def _ceiling(layout: Layout, start: int, output_row_bytes: int) -> int:
    """First row that the task may not take, so that input and output fit a block."""
    first = layout.block_of(start)
    block = first
    budget = BLOCK_BYTES_MAX + layout.byte_starts[first]
    last = min(len(layout.row_starts) - 1, first + TASK_BLOCKS_MAX)
    while block + 1 < last and layout.byte_starts[block + 2] <= budget:
        block += 1
    rows_max = min(BLOCK_ROWS_MAX, max(1, BLOCK_BYTES_MAX // (output_row_bytes + _ROW_OVERHEAD_BYTES)))
    return min(layout.row_starts[block + 1], start + rows_max)


def _rows_for(layout: Layout, cost: Cost, start: int, ceiling: int, target: int) -> int:
    """Most rows whose cost stays within `target`, or 0; found at the first guess where rows are alike."""
    whole = unit_micros(layout, cost, start, ceiling)
    if whole <= target:
        return ceiling - start
    low, high = start, ceiling - 1
    middle = min(high, start + (ceiling - start) * target // whole)
    while low < high:
        if unit_micros(layout, cost, start, middle) > target:
            high = middle - 1
        elif unit_micros(layout, cost, start, middle + 1) > target:
            return middle - start
        else:
            low = middle + 1
        middle = (low + high + 1) // 2
    return low - start
