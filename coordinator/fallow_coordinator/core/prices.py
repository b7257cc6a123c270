"""What a lease costs and what its worker is paid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fallow.credits import MICROCREDITS_PER_CREDIT
from fallow.session import Capability, DeviceKind, DeviceLevel
from fallow_coordinator.core.limits import UNIT_MICROS

QUOTA_MICROCREDITS_PER_UNIT = MICROCREDITS_PER_CREDIT
"""In quota pools one credit of allotment buys one unit."""


def is_within(ask: int, limit: int | None) -> bool:
    """Whether an ask may be taken; a limit filters and never orders. None: no limit."""
    return limit is None or ask <= limit


def price_paid(*, ask: int, runner_up_ask: int | None, limit: int | None) -> int:
    """Micro-credits for a unit that the winner is paid: never below its ask, never above the limit.

    The cheapest feasible free ask that was not used, else its own (a second price, which makes asking what one needs
    the best an owner can do: Vickrey, 1961). A winner that was taken for another reason than its price gets its ask.
    """
    assert is_within(ask, limit), "a limit filters before anybody wins"
    price = ask if runner_up_ask is None else max(ask, runner_up_ask)
    return price if limit is None else min(price, limit)


def reservation(price_microcredits_per_unit: int, unit_micros: int) -> int:
    """Micro-credits that a lease can cost at most, rounded up."""
    return -(-price_microcredits_per_unit * unit_micros // UNIT_MICROS)


def pay(reserved: int, *, rows: int, rows_failed: int) -> int:
    """Micro-credits for the rows that were done, rounded down; failed rows are not paid.

    NOTE: rows of a task count alike. Paying long rows more needs the cost of each row, which only their size features
    tell.
    """
    assert 0 <= rows_failed <= rows and rows > 0, "failed rows are some of the rows"
    return reserved * (rows - rows_failed) // rows


_CLASSES = (DeviceKind.GPU, DeviceKind.NPU, DeviceKind.CPU)
LOW_PERCENT, MEDIAN_PERCENT, HIGH_PERCENT = 10, 50, 90


def device_class(capability: Capability) -> str:
    """The class under which a worker's prices are told: the kind of its best usable device."""
    usable = {device.kind for device in capability.devices if device.level is not DeviceLevel.PRESENT}
    return next((kind.value for kind in _CLASSES if kind in usable), DeviceKind.CPU.value)


@dataclass(frozen=True, slots=True)
class PricePoint:
    """Work that was paid at one price."""

    price_microcredits_per_unit: int
    tasks: int
    unit_micros: int
    microcredits: int


def price_at(points: Sequence[PricePoint], percent: int) -> int:
    """The lowest price at or below which so much of the work was paid; 0 for no work. `points` rise by price."""
    total = sum(point.unit_micros for point in points)
    reached = 0
    for point in points:
        reached += point.unit_micros
        if reached * 100 >= total * percent:
            return point.price_microcredits_per_unit
    return 0
