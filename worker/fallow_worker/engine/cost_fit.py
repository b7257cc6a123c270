"""From repeated measurements of rows of several sizes to a cost curve. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Final

from fallow.cost import COST_KNOTS_MAX, UNIT_NANOS, UNIT_NANOS_PER_ROW_MAX, CostCurve, CostKnot

SIGNIFICANT_RISE: Final = 0.05
"""Costs of the longest and the shortest rows that differ by less than this are the same."""
STRAIGHT_ENOUGH: Final = 0.02
"""A knot whose cost lies within this of the line between its neighbours is left out."""
UNSTEADY: Final = 0.25
"""Repeats that lie further apart than this are told of."""
FLOPS_FLOOR_SPEEDUP: Final = 8
"""No core is believed to be more than this many times faster than the reference core."""
REFERENCE_FLOPS: Final = 50e9
"""One unit is a second of a core that multiplies float32 matrices at this speed."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Rows of one size, measured several times."""

    size: int
    units_per_row: tuple[float, ...]
    """Each repeat, in units: seconds of a core divided by those of a reference core for the work of calibration."""


def fitted(measured: Sequence[Measured], *, feature_number: int, flops_per_row: int) -> CostCurve:
    """The curve through what each size costs undisturbed, never falling, with as few knots as tell the same.

    No row costs less than its `flops_per_row` would on a core `FLOPS_FLOOR_SPEEDUP` times as fast as the reference.
    `measured` rises in size and each has a repeat at least.
    """
    assert measured and all(entry.units_per_row for entry in measured), "there is something to fit"
    floor = flops_per_row / REFERENCE_FLOPS / FLOPS_FLOOR_SPEEDUP
    costs = [max(undisturbed(entry.units_per_row, best=min), floor) for entry in measured]
    spread = max(_spread(entry.units_per_row) for entry in measured)
    notes: list[str] = []
    if spread > UNSTEADY:
        notes.append(f"repeats lay {spread:.0%} apart: the machine was disturbed, or cost depends on content")
    if max(costs) <= 0:
        notes.append("too fast to be measured")
    if not feature_number or max(costs) - min(costs) <= SIGNIFICANT_RISE * max(costs):
        knots = [CostKnot(measured[-1].size if feature_number else 0, _nanos(median(costs)))]
        return CostCurve(feature_number, tuple(knots), _permille(spread), "; ".join(notes))
    risen: list[float] = []
    for cost in costs:
        risen.append(max([cost, *risen[-1:]]))
    if max(now / was - 1 for now, was in zip(risen, costs, strict=True) if was > 0) > SIGNIFICANT_RISE:
        notes.append("larger rows were measured as cheaper than smaller ones, and are counted like those")
    points = [CostKnot(entry.size, _nanos(cost)) for entry, cost in zip(measured, risen, strict=True)]
    return CostCurve(feature_number, tuple(_without_straight(points)), _permille(spread), "; ".join(notes))


def undisturbed(repeats: Sequence[float], *, best: Callable[[Sequence[float]], float]) -> float:
    """What a measurement gives when nothing else uses the core's caches: near its best repeat.

    Other load on the machine only ever slows, so the best repeats agree from one inspection to the next where medians
    do not; the mean of the best eighth (three at least) is not moved by one lucky repeat.
    """
    ranked = sorted(repeats, reverse=best is max)
    return mean(ranked[: max(min(3, len(ranked)), len(ranked) // 8)])


def _without_straight(points: Sequence[CostKnot]) -> list[CostKnot]:
    """The points that a line between their kept neighbours would miss; first and last stay."""
    kept = list(points)
    while len(kept) > 2:
        misses = [
            abs(_between(kept[place - 1], kept[place + 1], kept[place].size) - kept[place].unit_nanos)
            / kept[place].unit_nanos
            for place in range(1, len(kept) - 1)
        ]
        least = min(range(len(misses)), key=misses.__getitem__)
        if misses[least] > STRAIGHT_ENOUGH and len(kept) <= COST_KNOTS_MAX:
            break
        del kept[least + 1]
    return kept


def _between(left: CostKnot, right: CostKnot, size: int) -> float:
    return left.unit_nanos + (right.unit_nanos - left.unit_nanos) * (size - left.size) / (right.size - left.size)


def _spread(repeats: Sequence[float]) -> float:
    """Median distance from the median, relative to it."""
    middle = median(repeats)
    return median(abs(repeat - middle) for repeat in repeats) / middle if middle > 0 else 0.0


def _nanos(units: float) -> int:
    return min(UNIT_NANOS_PER_ROW_MAX, max(1, round(units * UNIT_NANOS)))


def _permille(share: float) -> int:
    return min(1_000_000, round(share * 1_000))
