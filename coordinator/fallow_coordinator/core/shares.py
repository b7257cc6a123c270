"""Whose turn it is: fair share between accounts, and due times between the jobs of one.

Work done for an account counts half as much after each day. An account's place is

    share key = log2(decayed usage at time t) + t / half-life,

which does not change while nothing is done for it: later both terms shift by the same amount, one down, one up. So
sorted lists of keys stay sorted by themselves. Keys are integers, micro-bits; the logarithm is taken here, in
decisions, and recorded. (Decayed usage as in the multifactor priority of Slurm and the user priorities of HTCondor.)
"""

from __future__ import annotations

from math import exp2, log2

from fallow.job import JobOptions, Objective
from fallow_coordinator.core.limits import (
    CARBON_PATIENCE_MS,
    DAY_MS,
    HOUR_MS,
    PRIORITY_MAX,
    SHARE_FLOOR_UNITS,
    SHARE_HALF_LIFE_MS,
    UNIT_MICROS,
)

MICRO_BITS = 1_000_000
_FLOOR = SHARE_FLOOR_UNITS * UNIT_MICROS
assert SHARE_HALF_LIFE_MS == DAY_MS, "the formula above says so"


def share_key_after(share_key: int, unit_micros: int, now_ms: int) -> int:
    """The account's key once so much more is done for it; rises by at least one.

    Usage below `SHARE_FLOOR_UNITS` counts as that: fresh accounts are equal among themselves after their first task.
    """
    elapsed = now_ms / SHARE_HALF_LIFE_MS
    usage = max(float(_FLOOR), exp2(min(100.0, max(0.0, share_key / MICRO_BITS - elapsed))))
    return max(share_key + 1, round((log2(usage + unit_micros) + elapsed) * MICRO_BITS))


def usage_units(share_key: int, now_ms: int) -> int:
    """Units done lately for an account with this key, decayed; what is below the floor counts as none."""
    if not share_key:
        return 0
    usage = exp2(min(100.0, max(0.0, share_key / MICRO_BITS - now_ms / SHARE_HALF_LIFE_MS)))
    return max(0, round(usage / UNIT_MICROS) - SHARE_FLOOR_UNITS)


def due_ms(options: JobOptions, *, now_ms: int, run_ms: int) -> int:
    """When a job that queues now is due: the earliest of its account is cut first.

    An hour for each step of priority below the highest, or early enough for its deadline if it runs for `run_ms`.
    The moment does not move, so whatever waits long enough comes before everything new: nothing starves.
    """
    if options.objective is Objective.CARBON:
        # It may wait until its deadline and says so: when clean hours come, whoever must be done first goes first.
        return max(1, (options.deadline_ms or now_ms + CARBON_PATIENCE_MS) - run_ms)
    due = now_ms + (PRIORITY_MAX - options.priority) * HOUR_MS
    if options.deadline_ms:
        due = min(due, options.deadline_ms - run_ms)
    return max(1, due)
