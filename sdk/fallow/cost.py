"""What a row costs as a function of its size: a few measured sizes, straight lines between them, integers only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

UNIT_NANOS: Final = 1_000_000_000
"""Nano-units of a unit: a second of a core that multiplies float32 matrices at 50 GFLOP/s."""
COST_KNOTS_MAX: Final = 16
UNIT_NANOS_PER_ROW_MAX: Final = 10**15
"""Dearest row that a curve may claim: 10⁶ units."""
SIZE_MAX: Final = (1 << 32) - 1
"""Largest size feature of a row: it travels as a u32."""


@dataclass(frozen=True, slots=True)
class CostKnot:
    """What a row of this size was found to cost."""

    size: int
    unit_nanos: int


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Cost of a row over one size feature. Beyond the measured sizes it stays what it is at the nearest of them.

    Knots rise in size, and never fall in cost.
    """

    feature_number: int
    """Which size feature of the input schema it follows, counted from 1; 0: none, every row costs the same."""
    knots: tuple[CostKnot, ...]
    spread_permille: int = 0
    """How far the repeats of a measurement lay apart, at most: half of them within this much of their median."""
    note: str = ""
    """What was odd about the measurements, for people; empty: nothing."""

    @property
    def size_max(self) -> int:
        """Largest size that was measured."""
        return self.knots[-1].size

    def unit_nanos(self, size: int) -> int:
        """Cost of one row of this size."""
        return self.rows_unit_nanos(1, size)

    def rows_unit_nanos(self, rows: int, size_sum: int) -> int:
        """Cost of rows whose sizes add up to `size_sum`, all taken to be of the mean size; 0 for no rows.

        Where cost bends upwards, rows of very different sizes cost more than that: count them in groups of like size
        (`binned`) where sizes are known one by one.
        """
        if rows <= 0:
            return 0
        knots = self.knots
        if not self.feature_number or size_sum <= knots[0].size * rows:
            return knots[0].unit_nanos * rows
        if size_sum >= knots[-1].size * rows:
            return knots[-1].unit_nanos * rows
        high = bisect_right(knots, size_sum, key=lambda knot: knot.size * rows)
        left, right = knots[high - 1], knots[high]
        rise = (size_sum - left.size * rows) * (right.unit_nanos - left.unit_nanos)
        return left.unit_nanos * rows + rise // (right.size - left.size)

    def unit_nanos_of(self, bins: Iterable[SizeBin]) -> int:
        """Cost of all rows in these groups."""
        return sum(self.rows_unit_nanos(group.rows, self.size_sum(group.size_sums)) for group in bins)

    def size_sum(self, size_sums: Sequence[int]) -> int:
        """The sum that counts, of the sums of all size features; 0 when it follows none."""
        return size_sums[self.feature_number - 1] if 0 < self.feature_number <= len(size_sums) else 0


@dataclass(frozen=True, slots=True)
class SizeBin:
    """Rows of like size, counted together."""

    rows: int
    size_sums: tuple[int, ...]
    """Sum of each size feature of the schema over these rows."""


class SizeCounter:
    """Counts rows in groups whose sizes lie within an eighth of each other; cost is near a line within a group."""

    def __init__(self, feature_count: int) -> None:
        """For rows with so many size features."""
        self._feature_count = feature_count
        self._groups: dict[tuple[int, ...], list[int]] = {}

    def add(self, sizes: Sequence[int], rows: int = 1) -> None:
        """Counts `rows` rows, each of these sizes."""
        assert len(sizes) == self._feature_count, "each size feature has a size"
        group = self._groups.setdefault(tuple(map(bin_of, sizes)), [0] * (self._feature_count + 1))
        group[0] += rows
        for index, size in enumerate(sizes, start=1):
            group[index] += size * rows

    @property
    def bins(self) -> tuple[SizeBin, ...]:
        """The groups so far, the smallest first."""
        return tuple(SizeBin(group[0], tuple(group[1:])) for _, group in sorted(self._groups.items()))


def binned(sizes: Iterable[Sequence[int]], *, feature_count: int) -> tuple[SizeBin, ...]:
    """Rows, given by their size features, in groups (`SizeCounter`)."""
    counter = SizeCounter(feature_count)
    for row in sizes:
        counter.add(row)
    return counter.bins


def bin_of(size: int) -> int:
    """The number of the group that a size falls into; rises with size, at most 239 below 2³²."""
    if size < 8:
        return size
    length = size.bit_length()
    return 8 * (length - 3) + ((size >> (length - 4)) & 7)


def fault_of_curve(curve: CostCurve, *, feature_count: int) -> str:
    """What is wrong with a curve that somebody reported, in a sentence; empty: nothing."""
    knots, count = curve.knots, len(curve.knots)
    if not 1 <= count <= COST_KNOTS_MAX:
        return f"the cost curve has {count} knots, allowed are 1 to {COST_KNOTS_MAX}"
    if not 0 <= curve.feature_number <= feature_count:
        return f"the cost curve follows size feature {curve.feature_number} of {feature_count}"
    if not curve.feature_number and count > 1:
        return f"the cost curve follows no size feature and has {count} knots"
    if not 1 <= knots[0].unit_nanos <= knots[-1].unit_nanos <= UNIT_NANOS_PER_ROW_MAX:
        return (
            f"the cost curve goes from {knots[0].unit_nanos} to {knots[-1].unit_nanos} nano-units a row, allowed are "
            f"1 to {UNIT_NANOS_PER_ROW_MAX}"
        )
    if knots[0].size < 0 or knots[-1].size > SIZE_MAX:
        return f"the cost curve is about sizes {knots[0].size} to {knots[-1].size}, allowed are 0 to {SIZE_MAX}"
    for left, right in pairwise(knots):
        if left.size >= right.size or left.unit_nanos > right.unit_nanos:
            return f"the cost curve does not rise from size {left.size} to size {right.size}"
    return ""
