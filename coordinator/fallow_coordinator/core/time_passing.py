"""Decisions that only the clock calls for: what is due falls due."""

from __future__ import annotations

from fallow.session import Cause
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import health, measuring
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.auditing import given_up
from fallow_coordinator.core.deferral import planned
from fallow_coordinator.core.draft import Draft
from fallow_coordinator.core.duplicates import duplicates_due
from fallow_coordinator.core.limits import DUE_PER_TICK_MAX, PACK_PATIENCE_MS
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import State
from fallow_coordinator.core.treasury import renewals_due


def restart(state: State, command: c.Restart) -> Decision:
    """The writer came back: sessions are closed, leases live on by the down time."""
    assert command.epoch > state.epoch, "the store gives every writer an epoch of its own"
    return Decision((e.Restarted(epoch=command.epoch, down_time_ms=max(0, command.down_time_ms)),))


def tick(state: State, command: c.Tick, now_ms: int, names: Names) -> Decision:
    """Ends leases past their deadline and those of workers gone too long; asks anew for packings nobody answered."""
    draft = Draft(state)
    for grace_until_ms, worker_id in state.graces[:DUE_PER_TICK_MAX]:
        if grace_until_ms > now_ms:
            break
        for lease_id in state.workers[worker_id].leases:
            draft.end_lease(
                state.leases[lease_id], e.LeaseOutcome.LOST, Cause.WORKER, "its worker went away and did not come back"
            )
    for deadline_ms, lease_id in state.deadlines[:DUE_PER_TICK_MAX]:
        if deadline_ms > now_ms:
            break
        lease = state.leases[lease_id]
        if state.tasks[lease.task_id].answer is not None and now_ms < lease.granted_at_ms + lease.runtime_max_ms:
            # Nobody waits for it any more; its worker had less time than it was promised.
            draft.end_lease(lease, e.LeaseOutcome.REVOKED, Cause.PLATFORM, "its rows came from another worker first")
        else:
            draft.end_lease(lease, e.LeaseOutcome.EXPIRED, Cause.WORKER, "it was not done in time")
    draft.events.extend(health.warmed(state, now_ms))
    gone = {event.task_id for event in draft.events if isinstance(event, e.TaskDropped)}
    for lane in state.lanes.values():
        for task_id in lane.packing:
            task = state.tasks[task_id]
            if task.pack_requested_at_ms + PACK_PATIENCE_MS > now_ms:
                break
            if task_id not in gone:
                draft.events.append(e.PackRequested(task_id=task_id, pack_number=task.pack_number + 1))
    if state.verifications:
        # A lease that ends now may end its task: audits are given up by the next tick then.
        draft.events.extend(given_up(state, now_ms) if not draft.events else ())
    draft.events.extend(renewals_due(state, now_ms))
    ended = {event.job_id for event in draft.events if isinstance(event, e.JobStateChanged)}
    draft.events += [event for event in planned(state, now_ms) if event.job_id not in ended]
    if not draft.events:
        draft.events.extend(duplicates_due(state, now_ms, names))
    if draft.events or command.measuring is None:
        # What ends now may free whom it would challenge: devices have time until the next tick.
        return Decision(tuple(draft.events))
    return Decision(measuring.tick(state, command.measuring, now_ms, names))
