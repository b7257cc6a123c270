"""When a worker is there and how long it stays: counted in integers as sessions pass, asked as probabilities.

Two records, both small. For each hour of the week, how many minutes of it the worker was connected: people's days and
nights. For each doubling of time, how many stays ended in it: how long it lasts once it is there. A stay ends when the
worker is away for longer than `STAY_GAP_MS`; what a restart of ours cuts off says nothing about the worker. Old weeks
fade: after `WEEKS_REMEMBERED` all counts are halved.
"""

from __future__ import annotations

from fallow_coordinator.core.limits import (
    HOUR_MS,
    MINUTE_MS,
    STAY_GAP_MS,
    STAYS_BUCKETS,
    WEEK_MS,
    WEEKS_REMEMBERED,
)
from fallow_coordinator.core.state import Stays, Worker

HOURS_OF_WEEK = 168
_PRIOR_STAYS = 2.0
_PRIOR_ENDS = 0.2
"""Before anything is known a worker is thought to leave in one of ten doublings."""
_PRIOR_WEEKS = 1.0
"""Before anything is known an hour is thought to be like the present one: the worker is there."""


def comes(stays: Stays, at_ms: int) -> None:
    """A session opened. For `evolve` only."""
    gone_ms = at_ms - stays.left_at_ms
    if stays.first_at_ms == 0:
        stays.first_at_ms = stays.since_ms = at_ms
    elif gone_ms > STAY_GAP_MS:
        if not stays.cut_off:
            stays.ends[_bucket(stays.left_at_ms - stays.since_ms)] += 1
        for bucket in range(_bucket(stays.left_at_ms - stays.since_ms) + (0 if stays.cut_off else 1)):
            stays.at_risk[bucket] += 1
        stays.since_ms = at_ms
    stays.opened_at_ms = at_ms
    _fade(stays, at_ms)


def goes(stays: Stays, at_ms: int, *, cut_off: bool) -> None:
    """A session closed; `cut_off`: by us. For `evolve` only."""
    moment = max(stays.opened_at_ms, at_ms - WEEK_MS)
    while moment < at_ms:
        end = min(at_ms, moment - moment % HOUR_MS + HOUR_MS)
        hour = moment // HOUR_MS % HOURS_OF_WEEK
        stays.minutes[hour] = stays.minutes.get(hour, 0) + (end - moment + MINUTE_MS // 2) // MINUTE_MS
        moment = end
    stays.left_at_ms = at_ms
    stays.cut_off = cut_off


def stays_permille(worker: Worker, now_ms: int, for_ms: int) -> int:
    """How likely, in thousandths, a worker that is connected now still is after so long.

    The product of two estimates that lean on a prior while little is known: survival of stays as long as the present
    one (Kaplan and Meier, 1958, over doublings of time), and the least presence in the hours of the week ahead.
    """
    stays = worker.stays
    age_ms = max(0, now_ms - stays.since_ms) if stays.since_ms else 0
    return round(1_000 * _survives(stays, age_ms, for_ms) * _least_presence(stays, now_ms, for_ms))


def _survives(stays: Stays, age_ms: int, for_ms: int) -> float:
    chance = 1.0
    for bucket in range(STAYS_BUCKETS):
        start_ms, end_ms = _bounds(bucket)
        overlap_ms = min(end_ms, age_ms + for_ms) - max(start_ms, age_ms)
        if overlap_ms > 0:
            hazard = (stays.ends[bucket] + _PRIOR_ENDS) / (stays.at_risk[bucket] + _PRIOR_STAYS)
            chance *= (1.0 - min(0.99, hazard)) ** (overlap_ms / (end_ms - start_ms))
    return chance


def _least_presence(stays: Stays, now_ms: int, for_ms: int) -> float:
    weeks = max(0.0, (now_ms - stays.first_at_ms) / WEEK_MS) if stays.first_at_ms else 0.0
    first = now_ms // HOUR_MS
    hours = min(HOURS_OF_WEEK, for_ms // HOUR_MS + 1)
    least = 1.0
    for hour in range(first + 1, first + hours):
        minutes = stays.minutes.get(hour % HOURS_OF_WEEK, 0)
        least = min(least, (minutes / 60 + _PRIOR_WEEKS) / (max(weeks, minutes / 60) + _PRIOR_WEEKS))
    return least


def _bucket(length_ms: int) -> int:
    """Doublings of a minute: under 1 minute, under 2, under 4, …"""
    return min(STAYS_BUCKETS - 1, max(0, length_ms // MINUTE_MS).bit_length())


def _bounds(bucket: int) -> tuple[int, int]:
    return (MINUTE_MS << bucket >> 1 if bucket else 0), MINUTE_MS << bucket


def _fade(stays: Stays, at_ms: int) -> None:
    """Halves everything once it is old."""
    if at_ms - stays.first_at_ms < WEEKS_REMEMBERED * WEEK_MS:
        return
    stays.first_at_ms = at_ms - (at_ms - stays.first_at_ms) // 2
    stays.minutes = {hour: minutes // 2 for hour, minutes in stays.minutes.items() if minutes > 1}
    stays.ends = [count // 2 for count in stays.ends]
    stays.at_risk = [count // 2 for count in stays.at_risk]
