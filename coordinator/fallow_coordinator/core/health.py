"""How hosts that keep failing get less to do and come back.

A lease that ends by the host's own fault is a strike: the host failed, let time run out, or went away. What is the
fault of a row, a program or the platform, and what an owner takes back for himself, is none; nor is anything about
leases from before a restart of ours, or right after one. From the third strike without success between, the host gets
nothing for a while, twice as long each time; then one task at a time, and more with each task that is accepted.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from fallow.session import Cause
from fallow_coordinator.core import events as e
from fallow_coordinator.core.groups import place, unplace
from fallow_coordinator.core.limits import (
    AMNESTY_MS,
    COOL_DOWN_MS_MAX,
    COOL_DOWN_MS_MIN,
    DUE_PER_TICK_MAX,
    STRIKES_FREE,
    STRIKES_MAX,
)
from fallow_coordinator.core.state import Lease, State, Worker

HealthEvent = e.WorkerStruck | e.WorkerWarmed


def is_strike(state: State, lease: Lease, outcome: e.LeaseOutcome, cause: Cause) -> bool:
    """Whether this end of a lease is its worker's fault."""
    if cause is not Cause.WORKER or outcome is e.LeaseOutcome.REVOKED:
        return False
    return lease.granted_at_ms >= state.restarted_at_ms + (AMNESTY_MS if state.restarted_at_ms else 0)


def struck(worker: Worker) -> e.WorkerStruck:
    """The event of one more strike."""
    strikes = min(STRIKES_MAX, worker.strikes + 1)
    beyond = strikes - STRIKES_FREE
    cool_ms = min(COOL_DOWN_MS_MAX, COOL_DOWN_MS_MIN << (beyond - 1)) if beyond > 0 else 0
    return e.WorkerStruck(worker_id=worker.worker_id, strikes=strikes, cool_ms=cool_ms)


def warmed(state: State, now_ms: int) -> list[e.WorkerWarmed]:
    """The events of those whose rest is over."""
    due: list[e.WorkerWarmed] = []
    for until_ms, worker_id in state.cooling[:DUE_PER_TICK_MAX]:
        if until_ms > now_ms:
            break
        due.append(e.WorkerWarmed(worker_id=worker_id))
    return due


def evolve_health(state: State, event: HealthEvent, at_ms: int) -> None:
    """Applies one event about a host's health."""
    worker = state.workers[event.worker_id]
    unplace(state, worker)
    if worker.cooling_until_ms:
        entry = (worker.cooling_until_ms, worker.worker_id)
        index = bisect_left(state.cooling, entry)
        assert state.cooling[index] == entry, "who rests stands in the index"
        del state.cooling[index]
        worker.cooling_until_ms = 0
    if isinstance(event, e.WorkerStruck):
        worker.strikes = event.strikes
        if event.cool_ms:
            worker.window_max = 1
            worker.cooling_until_ms = at_ms + event.cool_ms
            insort(state.cooling, (worker.cooling_until_ms, worker.worker_id))
    place(state, worker)


def recovers(state: State, worker: Worker) -> None:
    """A task of the worker was accepted: one strike less, and room for twice as many leases. For `evolve` only."""
    if not worker.strikes and not worker.window_max:
        return
    unplace(state, worker)
    worker.strikes = max(0, worker.strikes - 1)
    if not worker.cooling_until_ms:
        worker.window_max = worker.window_max * 2 if worker.window_max * 2 < worker.window else 0
    place(state, worker)
