"""Sets of row positions kept as ranges: small when rows come and go in runs, as they do."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from fallow.errors import FallowError, Reason


class RangeSet:
    """An immutable set of non-negative integers as sorted, disjoint, non-touching half-open ranges.

    Held flat as (start, end, start, end, …), strictly increasing; operations give new sets.
    """

    __slots__ = ("_count", "_flat")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """The union of `ranges` (start, end), which may overlap, touch, be empty and come in any order."""
        flat: list[int] = []
        for start, end in sorted(ranges):
            assert start >= 0, "positions are not negative"
            if start >= end:
                continue
            if flat and start <= flat[-1]:
                flat[-1] = max(flat[-1], end)
            else:
                flat.extend((start, end))
        self._flat = tuple(flat)
        self._count = sum(flat[1::2]) - sum(flat[::2])

    @classmethod
    def of(cls, start: int, end: int) -> RangeSet:
        """The set of `start` up to, not including, `end`."""
        return cls(((start, end),))

    @classmethod
    def of_positions(cls, positions: Iterable[int]) -> RangeSet:
        """The set of single positions, in any order."""
        return cls((position, position + 1) for position in positions)

    @classmethod
    def from_flat(cls, flat: Sequence[int]) -> RangeSet:
        """The set that `flat` describes. Raises FIELD_INVALID unless it holds pairs that strictly increase from 0."""
        if len(flat) % 2 or (flat and flat[0] < 0) or any(low >= high for low, high in pairwise(flat)):
            raise FallowError(
                Reason.FIELD_INVALID,
                "ranges are not sorted, disjoint and non-empty",
                field="ranges",
                limit="start, end, start, end, … strictly increasing",
            )
        return cls._trusted(tuple(flat))

    @classmethod
    def _trusted(cls, flat: tuple[int, ...]) -> RangeSet:
        made = cls.__new__(cls)
        made._flat = flat
        made._count = sum(flat[1::2]) - sum(flat[::2])
        return made

    @property
    def flat(self) -> tuple[int, ...]:
        """start, end, start, end, …, strictly increasing: the form that is written down."""
        return self._flat

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges as (start, end), in order."""
        return tuple(zip(self._flat[::2], self._flat[1::2], strict=True))

    @property
    def range_count(self) -> int:
        """How many ranges it takes."""
        return len(self._flat) // 2

    def __len__(self) -> int:
        """How many positions are in the set."""
        return self._count

    def __bool__(self) -> bool:
        return bool(self._flat)

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and bisect_right(self._flat, position) % 2 == 1

    def __iter__(self) -> Iterator[int]:
        """The positions, rising."""
        for start, end in self.ranges:
            yield from range(start, end)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and self._flat == other._flat

    def __hash__(self) -> int:
        return hash(self._flat)

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(f'{start}..{end}' for start, end in self.ranges)})"

    def __or__(self, other: RangeSet) -> RangeSet:
        if not other:
            return self
        if not self:
            return other
        return RangeSet((*self.ranges, *other.ranges))

    def __sub__(self, other: RangeSet) -> RangeSet:
        if not self or not other:
            return self
        return self & other.complement(self._flat[-1])

    def __and__(self, other: RangeSet) -> RangeSet:
        mine, theirs = self._flat, other._flat
        flat: list[int] = []
        left = right = 0
        while left < len(mine) and right < len(theirs):
            start, end = max(mine[left], theirs[right]), min(mine[left + 1], theirs[right + 1])
            if start < end:
                flat.extend((start, end))
            if mine[left + 1] <= theirs[right + 1]:
                left += 2
            else:
                right += 2
        return RangeSet._trusted(tuple(flat))

    def isdisjoint(self, other: RangeSet) -> bool:
        """Whether no position is in both."""
        return not any(self.overlaps(start, end) for start, end in other.ranges)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any position from `start` up to `end` is in the set."""
        if start >= end:
            return False
        low, high = bisect_right(self._flat, start), bisect_left(self._flat, end)
        return low % 2 == 1 or high > low

    def covers(self, start: int, end: int) -> bool:
        """Whether every position from `start` up to `end` is in the set; true for none."""
        if start >= end:
            return True
        low = bisect_right(self._flat, start)
        return low % 2 == 1 and self._flat[low] >= end

    def add(self, start: int, end: int) -> RangeSet:
        """This set and the positions from `start` up to `end`."""
        assert start >= 0, "positions are not negative"
        if start >= end:
            return self
        low, high = bisect_left(self._flat, start), bisect_right(self._flat, end)
        middle = (() if low % 2 else (start,)) + (() if high % 2 else (end,))
        return RangeSet._trusted(self._flat[:low] + middle + self._flat[high:])

    def subtract(self, start: int, end: int) -> RangeSet:
        """This set without the positions from `start` up to `end`."""
        if start >= end:
            return self
        low, high = bisect_left(self._flat, start), bisect_right(self._flat, end)
        middle = ((start,) if low % 2 else ()) + ((end,) if high % 2 else ())
        return RangeSet._trusted(self._flat[:low] + middle + self._flat[high:])

    def take_first(self, count: int) -> tuple[RangeSet, RangeSet]:
        """(the lowest `count` positions, or all when there are fewer; the rest)."""
        assert count >= 0, "a count is not negative"
        left = count
        for index in range(0, len(self._flat), 2):
            length = self._flat[index + 1] - self._flat[index]
            if left < length:
                cut = self._flat[index] + left
                taken = self._flat[:index] + ((self._flat[index], cut) if left else ())
                return RangeSet._trusted(taken), RangeSet._trusted((cut, *self._flat[index + 1 :]))
            left -= length
        return self, RangeSet()

    def complement(self, end: int) -> RangeSet:
        """The positions from 0 up to `end` that are not in the set."""
        if end <= 0:
            return RangeSet()
        inside = self._flat[: bisect_left(self._flat, end)]
        head = inside[1:] if inside and inside[0] == 0 else (0, *inside)
        return RangeSet._trusted(head if len(head) % 2 == 0 else (*head, end))
