"""What follows from an event once it is durable."""

from __future__ import annotations

from fallow.errors import Reason
from fallow.ids import Digest, LeaseId, PartyId
from fallow_coordinator.core import effects as f
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.sessions import REPLACED
from fallow_coordinator.core.state import EndedLease, State, TaskPhase

_NOTHING: tuple[f.Effect, ...] = ()
_SILENT = frozenset({e.TaskCreated, e.TaskInputPacked})
"""Frequent events from which nothing follows, told before the long way through all others."""


def effects_of(state: State, event: e.Event) -> tuple[f.Effect, ...]:  # noqa: C901, PLR0911 one arm each
    """Effects of one event, asked right after `evolve` applied it, so that `state` is the state it left behind."""
    if type(event) in _SILENT:
        return _NOTHING
    match event:
        case e.PackRequested():
            return (f.PackTask(task_id=event.task_id, pack_number=event.pack_number),)
        case e.LeaseGranted():
            task = state.tasks[event.task_id]
            sent = f.SendLease(session_id=event.session_id, lease_id=event.lease_id)
            return (sent,) if task.job_id is None else (sent, f.WakeWatchers(job_id=task.job_id))
        case e.CommitmentRecorded():
            return _NOTHING if event.inline else _offers(state, (event.lease_id,))
        case e.TaskSettled() | e.LateLeaseSettled():
            return _settled(state, event)
        case e.LeaseEnded():
            return _ended(state, event)
        case e.TaskAbandoned():
            return _NOTHING
        case e.JobSubmitted() | e.JobStateChanged() | e.JobDeleted() | e.JobFunded():
            return (f.WakeWatchers(job_id=event.job_id),)
        case e.BundleInspected() | e.BundleHeld() | e.BundleRegistered() | e.BundleReleased():
            return (f.WakeBundleWatchers(bundle_digest=event.bundle_digest),)
        case e.SessionOpened():
            held = state.workers[event.worker_id].certificates
            return (*_offers(state, event.kept), *_standings(state, event.worker_id, *held))
        case e.DeviceMeasured() | e.DeviceCertificateEnded() | e.ChallengeEnded():
            return _standings(state, event.worker_id, event.device_id)
        case e.SessionClosed():
            return (_end_session(state, event),)
        case e.PartyRevoked():
            return (f.EndParty(party_id=event.party_id),)
        case e.Restarted():
            packing = [task for task in state.tasks.values() if task.phase is TaskPhase.PACKING]
            packs = (f.PackTask(task_id=task.task_id, pack_number=task.pack_number) for task in packing)
            return (*packs, *_comparisons(state))
        case v.RowsCorrected() | v.EvidenceReleased() | v.AssuranceAccepted():
            return (f.WakeWatchers(job_id=event.job_id),)
        case _:
            return _NOTHING


def _comparisons(state: State) -> tuple[f.Effect, ...]:
    """Audits that have settled and were not compared."""
    return tuple(
        f.CompareRows(job_id, audit.task_id)
        for job_id, verification in state.verifications.items()
        for audit in verification.audits.values()
        if audit.lease_id is not None and not audit.compared
    )


def _offers(state: State, lease_ids: tuple[LeaseId, ...]) -> tuple[f.Effect, ...]:
    """Upload offers for committed leases; after a reconnect they are made again."""
    made: list[f.Effect] = []
    for lease_id in lease_ids:
        lease = state.leases[lease_id]
        delivered = state.tasks[lease.task_id].answer is not None
        if lease.commitment is not None and not lease.commitment.inline and not delivered:
            made.append(f.SendUploadOffer(session_id=lease.session_id, lease_id=lease_id))
    return tuple(made)


def _standings(state: State, worker_id: PartyId, *device_ids: str) -> tuple[f.Effect, ...]:
    session_id = state.workers[worker_id].session_id
    return () if session_id is None else tuple(f.SendStanding(session_id, worker_id, name) for name in device_ids)


def _settled(state: State, event: e.TaskSettled | e.LateLeaseSettled) -> tuple[f.Effect, ...]:
    ended = state.ended_leases[event.lease_id]
    worker = state.workers[ended.worker_id]
    made: list[f.Effect] = []
    if worker.session_id is not None:
        made.append(
            f.SendSettled(
                session_id=worker.session_id,
                lease_id=event.lease_id,
                fence=ended.fence,
                microcredits=event.microcredits,
            )
        )
    if ended.input is not None and not _is_inspected(state, ended, ended.input):
        made.append(f.DropInput(ended.input))
    made += map(f.DropInput, ended.candidates)
    if ended.job_id is not None:
        made.append(f.WakeWatchers(job_id=ended.job_id))
        verification = state.verifications.get(ended.job_id)
        if verification is not None and event.task_id in verification.audits:
            made.append(f.CompareRows(ended.job_id, event.task_id))
    return tuple(made)


def _ended(state: State, event: e.LeaseEnded) -> tuple[f.Effect, ...]:
    """The worker is told, also when it said so itself: it repeats that until it is answered. A worker that is away
    finds out when it comes back."""
    ended = state.ended_leases[event.lease_id]
    worker = state.workers[ended.worker_id]
    made: list[f.Effect] = []
    if worker.session_id is not None:
        made.append(
            f.SendRevoked(session_id=worker.session_id, lease_id=event.lease_id, fence=ended.fence, reason=event.reason)
        )
    if ended.input is not None and not _is_inspected(state, ended, ended.input):
        made.append(f.DropInput(ended.input))
    made += map(f.DropInput, ended.candidates)
    if ended.job_id is not None:
        made.append(f.WakeWatchers(job_id=ended.job_id))
    return tuple(made)


def _is_inspected(state: State, ended: EndedLease, digest: Digest) -> bool:
    """Whether an inspection that is still to be done runs the rows of a lease's block; another may have done them."""
    holder = state.tasks.get(ended.task_id) or (state.jobs.get(ended.job_id) if ended.job_id is not None else None)
    bundle = state.bundles.get(holder.bundle_digest) if holder is not None else None
    if bundle is None or bundle.inspection_task_id is None:
        return False
    kept = state.tasks[bundle.inspection_task_id].input
    return kept is not None and kept.digest == digest


def _end_session(state: State, event: e.SessionClosed) -> f.EndSession:
    code = {
        REPLACED: Reason.SESSION_REPLACED.value,
        "revoked": Reason.PARTY_REVOKED.value,
        "quarantined": Reason.PARTY_QUARANTINED.value,
    }.get(event.reason, "")
    return f.EndSession(session_id=event.session_id, reason_code=code, reason=event.reason)
