"""How much of what a machine spent belongs to a task: samples of sensors in, micro-joules out. Pure integer arithmetic.

Between two samples lies an interval with what the sensors counted and what the processors worked. Of each interval the
idle baseline is taken away first: a machine that is on anyway would have spent it. The rest is shared by CPU time among
all that ran, other programs included, and what one task was given no other gets: the sum over tasks never exceeds what
was measured.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

INTERVALS_MAX: Final = 8_192
"""Intervals remembered: 11 hours at one each 5 s, longer than any lease runs."""
BASELINES_MAX: Final = 32
"""Idle intervals of which the lowest power is the baseline; older ones are forgotten, because screens come and go."""
BASELINE_MICROSECONDS_MIN: Final = 1_000_000
"""Shorter intervals say nothing of rest."""
COVERED_PERCENT_MIN: Final = 80
"""A task of which the samples cover less is not measured."""
WATTS_MAX: Final = 20_000
"""No machine spends more: a sensor that says so is broken."""
_STILL_MICROSECONDS_MIN: Final = 500_000
"""A counter that stands still while processors worked for so long is broken."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter of energy that only grows, until it begins anew at `range_microjoules`."""

    name: str
    microjoules: int
    range_microjoules: int = 0
    """0: it never begins anew."""


@dataclass(frozen=True, slots=True)
class Power:
    """What a sensor says is being spent just now."""

    name: str
    microwatts: int


@dataclass(frozen=True, slots=True)
class Sample:
    """All sensors at one moment of a clock that never goes back."""

    at_us: int
    busy_us: int
    """CPU time of all programs since the machine started."""
    counters: tuple[Counter, ...] = ()
    powers: tuple[Power, ...] = ()


@dataclass(slots=True)
class Interval:
    """What lies between two samples; what tasks took is gone from `left_microjoules` and `left_us`."""

    start_us: int
    end_us: int
    microjoules: int
    left_microjoules: int
    left_us: int


def spent_microjoules(before: Sample, after: Sample) -> int | None:
    """What all sensors counted between two samples, or None when one of them can't be right.

    Counters of the same name are subtracted, with one wrap-around; powers are taken as their mean. A counter that is
    lower and has no range was reset, one that is new has no past: both count for nothing.
    """
    took_us = after.at_us - before.at_us
    if took_us <= 0:
        return None
    total, moved = 0, False
    earlier = {counter.name: counter.microjoules for counter in before.counters}
    for counter in after.counters:
        if counter.name not in earlier:
            continue
        grown = counter.microjoules - earlier[counter.name]
        if grown < 0 < counter.range_microjoules:
            grown += counter.range_microjoules
        moved |= grown > 0
        total += max(0, grown)
    powers = {power.name: power.microwatts for power in before.powers}
    for power in after.powers:
        mean_microwatts = (powers.get(power.name, power.microwatts) + power.microwatts) // 2
        moved |= mean_microwatts > 0
        total += max(0, mean_microwatts) * took_us // 1_000_000
    stands_still = not moved and after.busy_us - before.busy_us >= _STILL_MICROSECONDS_MIN
    # Micro-watts times micro-seconds are 10⁻¹² joules.
    return None if stands_still or total > WATTS_MAX * took_us else total


class EnergyBook:
    """Keeps what was measured and gives it out, each micro-joule at most once."""

    def __init__(self) -> None:
        self.faults = 0
        """Samples in a row that could not be right."""
        self._last: Sample | None = None
        self._intervals: deque[Interval] = deque(maxlen=INTERVALS_MAX)
        self._baselines: deque[int] = deque(maxlen=BASELINES_MAX)

    @property
    def idle_microwatts(self) -> int:
        """The lowest power seen lately while no task ran; 0 while nothing is known."""
        return min(self._baselines, default=0)

    def observe(self, sample: Sample, *, working: bool) -> None:
        """One more sample; `working`: whether any task ran since the last."""
        before, self._last = self._last, sample
        if before is None:
            return
        microjoules = spent_microjoules(before, sample)
        if microjoules is None:
            self.faults += 1
            return
        self.faults = 0
        took_us = sample.at_us - before.at_us
        if not working and took_us >= BASELINE_MICROSECONDS_MIN:
            self._baselines.append(microjoules * 1_000_000 // took_us)
        beyond_rest = max(0, microjoules - self.idle_microwatts * took_us // 1_000_000)
        busy_us = max(0, sample.busy_us - before.busy_us)
        self._intervals.append(Interval(before.at_us, sample.at_us, microjoules, beyond_rest, busy_us))

    def forget(self) -> None:
        """The sensors were away: what comes next has no past."""
        self._last = None

    def take(self, start_us: int, end_us: int, cpu_us: int) -> int | None:
        """Micro-joules of a task that ran from `start_us` to `end_us` with so much CPU time; None: not measured.

        Its CPU time is spread over the intervals as their work is, and in each it gets its share of what is left.
        """
        touched = [each for each in self._intervals if each.end_us > start_us and each.start_us < end_us]
        covered_us = sum(_overlap_us(each, start_us, end_us) for each in touched)
        if end_us <= start_us or covered_us * 100 < COVERED_PERCENT_MIN * (end_us - start_us):
            return None
        parts = [
            each.left_us * _overlap_us(each, start_us, end_us) // (each.end_us - each.start_us) for each in touched
        ]
        whole = sum(parts)
        taken = 0
        for each, part in zip(touched, parts, strict=True):
            if not part:
                continue
            mine_us = min(part, cpu_us * part // whole)
            microjoules = each.left_microjoules * mine_us // each.left_us
            each.left_microjoules -= microjoules
            each.left_us -= mine_us
            taken += microjoules
        return taken


def _overlap_us(interval: Interval, start_us: int, end_us: int) -> int:
    return max(0, min(interval.end_us, end_us) - max(interval.start_us, start_us))


# ------------------------------------------------------------------------------------------------- without sensors


@dataclass(frozen=True, slots=True)
class PowerModel:
    """What one hardware thread at full work is taken to spend, and where that figure comes from."""

    milliwatts_per_cpu: int
    source: str
    milliwatts_per_gib: int = 0

    def estimated_joules(self, *, wall_us: int, cpu_us: int, memory_bytes: int) -> float:
        """CPU seconds times watts of a hardware thread, and memory held times seconds times watts of a GiB."""
        milliwatt_us = cpu_us * self.milliwatts_per_cpu + wall_us * self.milliwatts_per_gib * memory_bytes / (1 << 30)
        return max(0.0, milliwatt_us / 1e9)
