"""How events about sessions change the state."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import assert_never

from fallow_coordinator.core import events as e
from fallow_coordinator.core.availability import comes, goes
from fallow_coordinator.core.groups import place, slots_of, unplace
from fallow_coordinator.core.holders import forget_all, unload_all
from fallow_coordinator.core.limits import BUNDLES_KEPT_AWAY_MS_MAX, RESTART_GRACE_MS, SESSION_GRACE_MS
from fallow_coordinator.core.state import State, Worker

SessionEvent = e.SessionOpened | e.SessionClosed | e.CapabilityReported | e.Restarted


def evolve_session(state: State, event: SessionEvent, at_ms: int) -> None:
    """Applies one event about a stream."""
    match event:
        case e.SessionOpened():
            _open(state, event, at_ms)
        case e.SessionClosed():
            worker = state.workers[state.sessions[event.session_id]]
            assert worker.session_id == event.session_id, "a worker has one session"
            _close(state, worker, at_ms, grace_ms=SESSION_GRACE_MS)
        case e.CapabilityReported():
            worker = state.workers[state.sessions[event.session_id]]
            unplace(state, worker)
            if event.capability is not None:
                worker.capability = event.capability
                worker.slots = slots_of(event.capability)
            worker.window = event.window
            place(state, worker)
        case e.Restarted():
            assert event.epoch > state.epoch, "every writer has an epoch of its own"
            state.restarted_at_ms = at_ms if state.epoch else 0
            state.epoch = event.epoch
            for worker_id in list(state.sessions.values()):
                _close(state, state.workers[worker_id], at_ms, grace_ms=RESTART_GRACE_MS, cut_off=True)
            for _, worker_id in list(state.graces):
                worker = state.workers[worker_id]
                _end_grace(state, worker)
                _begin_grace(state, worker, at_ms + RESTART_GRACE_MS)
            _lengthen_leases(state, event.down_time_ms)
        case _:
            assert_never(event)


def _open(state: State, event: e.SessionOpened, at_ms: int) -> None:
    worker = state.workers[event.worker_id]
    assert worker.session_id is None, "the older session is closed by an event of its own"
    assert event.session_id not in state.sessions, "a session is opened once"
    _end_grace(state, worker)
    if at_ms - worker.closed_at_ms > BUNDLES_KEPT_AWAY_MS_MAX:
        forget_all(state, worker)
    if event.presented_token_digest is None:
        unload_all(worker)
    comes(worker.stays, at_ms)
    worker.session_id = event.session_id
    worker.sessions += 1
    worker.presented_token_digest = event.presented_token_digest
    worker.resume_token_digest = event.resume_token_digest
    worker.machine_digest = event.machine_digest
    worker.capability = event.capability
    worker.slots = slots_of(event.capability)
    worker.window = event.window
    state.sessions[event.session_id] = event.worker_id
    for lease_id in event.kept:
        lease = state.leases[lease_id]
        assert lease.worker_id == worker.worker_id, "a worker keeps its own leases"
        lease.session_id = event.session_id
    worker.free_since_ms = 0 if worker.leases else state.clock_ms
    place(state, worker)


def _close(state: State, worker: Worker, at_ms: int, *, grace_ms: int, cut_off: bool = False) -> None:
    assert worker.session_id is not None, "an open session is closed"
    unplace(state, worker)
    del state.sessions[worker.session_id]
    worker.session_id = None
    worker.free_since_ms = 0
    worker.closed_at_ms = at_ms
    goes(worker.stays, at_ms, cut_off=cut_off)
    if worker.leases:
        _begin_grace(state, worker, at_ms + grace_ms)


def _begin_grace(state: State, worker: Worker, until_ms: int) -> None:
    worker.grace_until_ms = until_ms
    insort(state.graces, (until_ms, worker.worker_id))


def _end_grace(state: State, worker: Worker) -> None:
    if worker.grace_until_ms:
        entry = (worker.grace_until_ms, worker.worker_id)
        index = bisect_left(state.graces, entry)
        assert state.graces[index] == entry, "a worker in grace stands in the index"
        del state.graces[index]
        worker.grace_until_ms = 0


def end_grace_if_empty(state: State, worker: Worker) -> None:
    """A worker that is away and holds nothing any more needs no grace."""
    if not worker.leases and worker.grace_until_ms:
        _end_grace(state, worker)


def _lengthen_leases(state: State, down_time_ms: int) -> None:
    for lease in state.leases.values():
        lease.deadline_ms += down_time_ms
    state.deadlines = [(deadline_ms + down_time_ms, lease_id) for deadline_ms, lease_id in state.deadlines]
