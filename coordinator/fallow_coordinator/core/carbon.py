"""When and where work shall run so that little carbon is emitted: a plan over forecasts, pure and in integers.

Each hour of each region is a slot with grams per kWh and room for work. Work goes to the cleanest slots that end before
its deadline, earliest deadline first; the dirtiest slot it needs is its ceiling. It runs while some region is at or
below the ceiling and waits otherwise (the merit order of power plants, turned round; cf. Wiesner et al., "Let's Wait
Awhile", Middleware 2021). The plan is made anew every `PLAN_EVERY_MS`, with what is left then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fallow.ids import JobId
from fallow_coordinator.core.limits import (
    CARBON_CAPACITY_PERCENT,
    CARBON_MARGIN_MS_MIN,
    CARBON_MARGIN_PERCENT,
    HOUR_MS,
)

NO_CEILING = 1 << 31
ELSEWHERE = ""
"""The region of workers that name none, or one that is not forecast."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Grams per kWh of each hour from `from_ms` on, which begins an hour."""

    from_ms: int
    grams_per_kwh: tuple[int, ...]

    def at(self, at_ms: int) -> int | None:
        """Grams per kWh in the hour that holds the moment; None when it is not forecast."""
        hour = (at_ms - self.from_ms) // HOUR_MS
        return self.grams_per_kwh[hour] if 0 <= hour < len(self.grams_per_kwh) else None


def forecast_of(forecasts: Mapping[str, Forecast], region: str) -> Forecast | None:
    """The region's, else that of all whose region nobody knows."""
    return forecasts.get(region.lower()) or forecasts.get(ELSEWHERE)


def grams_at(forecasts: Mapping[str, Forecast], region: str, at_ms: int) -> int | None:
    """Grams per kWh in a region now, or None when nobody knows."""
    found = forecast_of(forecasts, region)
    return found.at(at_ms) if found is not None else None


def micrograms(millijoules: int, grams_per_kwh: int) -> int:
    """What so much energy emits: 1 kWh is 3.6 × 10⁹ millijoules, 1 g is 10⁶ micrograms, rounded to the nearest."""
    return (millijoules * grams_per_kwh + 1_800) // 3_600


@dataclass(frozen=True, slots=True)
class Demand:
    """What is left of a job that may wait."""

    job_id: JobId
    unit_micros: int
    due_ms: int
    regions: frozenset[str] | None = None
    """Where it may run; None: anywhere."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes of it."""

    ceilings: Mapping[JobId, int] = field(default_factory=dict[JobId, int])
    """Grams per kWh up to which the job runs; `NO_CEILING`: it can't wait."""
    waits_until_ms: Mapping[JobId, int] = field(default_factory=dict[JobId, int])
    """Of each job for which every region is too dirty now: the next hour that is clean enough."""
    closed: frozenset[str] = frozenset()
    """Regions above every ceiling of those that run now: no work that may wait goes there in this hour."""


@dataclass(frozen=True, slots=True)
class _Slot:
    grams: int
    start_ms: int
    end_ms: int
    region: str
    unit_micros_per_hour: int


def latest_end_ms(now_ms: int, due_ms: int) -> int:
    """By when waiting work shall be done: before its deadline by a tenth of the time left, and a margin at least."""
    left_ms = due_ms - now_ms
    return due_ms - max(CARBON_MARGIN_MS_MIN, left_ms * CARBON_MARGIN_PERCENT // 100)


def plan(
    now_ms: int,
    forecasts: Mapping[str, Forecast],
    rooms: Mapping[str, int],
    demands: Iterable[Demand],
    *,
    other_unit_micros: int = 0,
) -> Plan:
    """The plan for one pool.

    `rooms`: micro-units that each region's workers do in an hour; `other_unit_micros`: work that does not wait and is
    taken to go first. Of the rooms only `CARBON_CAPACITY_PERCENT` are counted on: speeds and neighbours are not known.
    """
    known = {region: grams for region in rooms if (grams := grams_at(forecasts, region, now_ms)) is not None}
    if not known:
        return Plan()
    slots = _slots(now_ms, forecasts, rooms)
    ceilings: dict[JobId, int] = {}
    waits: dict[JobId, int] = {}
    open_up_to = -1
    before = other_unit_micros
    for demand in sorted(demands, key=lambda each: (each.due_ms, each.job_id)):
        before += demand.unit_micros
        ceiling = _ceiling(slots, demand, before, latest_end_ms(now_ms, demand.due_ms))
        ceilings[demand.job_id] = ceiling
        here = min((known[region] for region in known if _may_run(demand, region)), default=None)
        until = None
        if here is not None and here > ceiling:
            until = _next_ms(slots, demand, ceiling, now_ms)
        if until is None:
            open_up_to = max(open_up_to, ceiling)
        else:
            waits[demand.job_id] = until
    if open_up_to < 0:
        return Plan(ceilings, waits)
    return Plan(ceilings, waits, frozenset(region for region, grams in known.items() if grams > open_up_to))


def _may_run(demand: Demand, region: str) -> bool:
    return demand.regions is None or region in demand.regions


def _slots(now_ms: int, forecasts: Mapping[str, Forecast], rooms: Mapping[str, int]) -> list[_Slot]:
    """Every hour of every region from now on, the cleanest first; of the present hour what is left."""
    slots: list[_Slot] = []
    for region, room in rooms.items():
        found = forecast_of(forecasts, region)
        if found is None or room <= 0:
            continue
        for hour, grams in enumerate(found.grams_per_kwh):
            start_ms = found.from_ms + hour * HOUR_MS
            if start_ms + HOUR_MS > now_ms:
                slots.append(_Slot(grams, max(now_ms, start_ms), start_ms + HOUR_MS, region, room))
    slots.sort(key=lambda slot: (slot.grams, slot.start_ms, slot.region))
    return slots


def _ceiling(slots: Sequence[_Slot], demand: Demand, unit_micros: int, latest_ms: int) -> int:
    """Grams of the dirtiest slot that so much work needs before `latest_ms`."""
    wanted = unit_micros * 100
    for slot in slots:
        end_ms = min(slot.end_ms, latest_ms)
        if end_ms <= slot.start_ms or not _may_run(demand, slot.region):
            continue
        wanted -= slot.unit_micros_per_hour * (end_ms - slot.start_ms) // HOUR_MS * CARBON_CAPACITY_PERCENT
        if wanted <= 0:
            return slot.grams
    return NO_CEILING


def _next_ms(slots: Sequence[_Slot], demand: Demand, ceiling: int, now_ms: int) -> int | None:
    """When the next slot begins that is clean enough."""
    end = bisect_left(slots, ceiling + 1, key=lambda slot: slot.grams)
    starts = (slot.start_ms for slot in slots[:end] if slot.start_ms > now_ms and _may_run(demand, slot.region))
    return min(starts, default=None)
