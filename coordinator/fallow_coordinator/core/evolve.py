"""How an event changes the state. The only place where state changes; integers only; replay calls nothing else.

Shipped meaning is for ever: `tests/golden_journals` fold to the same state with every later version.
"""

from __future__ import annotations

from typing import assert_never, cast, get_args

from fallow_coordinator.core import events as e
from fallow_coordinator.core import (
    evolve_carbon,
    evolve_devices,
    evolve_door,
    evolve_identity,
    evolve_jobs,
    evolve_ledger,
    evolve_sessions,
    evolve_tasks,
    evolve_verification,
    health,
    tolerances,
)
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.ledger import Posting
from fallow_coordinator.core.postings import postings_of
from fallow_coordinator.core.state import State
from fallow_coordinator.core.tolerance_events import DeviationsLearned

_OF_TASKS = frozenset(get_args(evolve_tasks.TaskEvent))


def evolve(state: State, event: e.Event, at_ms: int) -> None:
    """Applies the journal's next event; `state.sequence` then is its sequence number, `state.clock_ms` its moment.

    Asserts on anything that no decision can have made: then the journal or this program is broken.
    """
    evolve_posted(state, event, at_ms, postings_of(state, event))


def evolve_posted(state: State, event: e.Event, at_ms: int, postings: tuple[Posting, ...]) -> None:
    """As `evolve`, for who has asked for the event's postings already."""
    assert at_ms >= state.clock_ms, "the journal's clock never goes back"
    state.sequence += 1
    state.clock_ms = at_ms
    if postings:
        state.ledger.post(postings)
    if type(event) in _OF_TASKS:
        # By far the most events: they need not wait for the arms below.
        evolve_tasks.evolve_task(state, cast("evolve_tasks.TaskEvent", event), at_ms)
        return
    match event:
        case (
            e.TaskCreated()
            | e.PackRequested()
            | e.TaskInputPacked()
            | e.PackingFailed()
            | e.LeaseGranted()
            | e.LeaseEnded()
            | e.CommitmentRecorded()
            | e.TaskSettled()
            | e.LateLeaseSettled()
            | e.TaskAbandoned()
            | e.TaskDropped()
        ):
            evolve_tasks.evolve_task(state, event, at_ms)
        case e.WorkerStruck() | e.WorkerWarmed():
            health.evolve_health(state, event, at_ms)
        case e.SessionOpened() | e.SessionClosed() | e.CapabilityReported() | e.Restarted():
            evolve_sessions.evolve_session(state, event, at_ms)
        case (
            e.BlobRecorded()
            | e.BundleRegistered()
            | e.BundleInspected()
            | e.BundleHeld()
            | e.BundleCrashed()
            | e.BundleCostLearned()
            | e.JobSubmitted()
            | e.JobStateChanged()
            | e.JobArchived()
            | e.JobDeleted()
            | e.BlobsForgotten()
            | e.BlobQuotaSet()
        ):
            evolve_jobs.evolve_job(state, event, at_ms)
        case e.ForecastsRecorded() | e.CarbonPlanned() | e.JobDeferred() | e.JobResumed():
            evolve_carbon.evolve_carbon(state, event, at_ms)
        case (
            e.JournalStarted()
            | e.AccountCreated()
            | e.PoolCreated()
            | e.TokenIssued()
            | e.TokenRevoked()
            | e.PartyEnrolled()
            | e.CertificateIssued()
            | e.PartyRevoked()
            | e.WorkerQuarantined()
            | e.WorkerReleased()
        ):
            evolve_identity.evolve_identity(state, event, at_ms)
        case (
            e.AccountAdmitted() | e.AccountExpelled() | e.BundleCleared() | e.BundleReleased() | e.InspectionRowsGiven()
        ):
            evolve_door.evolve_door(state, event)
        case (
            e.PoolModeChanged()
            | e.CreditsGranted()
            | e.CreditsReleased()
            | e.AllotmentSet()
            | e.AllotmentRenewed()
            | e.JobFunded()
        ):
            evolve_ledger.evolve_ledger(state, event)
        case (
            e.ChallengeIssued()
            | e.ChallengeAnswered()
            | e.DeviceMeasured()
            | e.DeviceCertificateEnded()
            | e.ChallengeEnded()
        ):
            evolve_devices.evolve_device(state, event, at_ms)
        case (
            v.DrawSecretSet()
            | v.AuditsDrawn()
            | v.AuditCompared()
            | v.AuditGivenUp()
            | v.RefereeReported()
            | v.VerdictReached()
            | v.RowsCorrected()
            | v.EvidenceReleased()
            | v.PayVoided()
            | v.WorkerDistrusted()
            | v.WorkerTrusted()
            | v.AssuranceAccepted()
        ):
            evolve_verification.evolve_verification(state, event, at_ms)
        case DeviationsLearned():
            tolerances.evolve_tolerances(state, event)
        case _:
            assert_never(event)
