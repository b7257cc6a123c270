"""What a command brings about, as events; the state stands still. Refusals are FallowErrors."""

from __future__ import annotations

from typing import assert_never

from fallow_coordinator.core import (
    admission,
    blobs,
    bundles,
    deferral,
    holding,
    identity,
    jobs,
    judging,
    leases,
    matching,
    sessions,
    time_passing,
    treasury,
    verifying,
)
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import State


def decide(state: State, command: c.Command, now_ms: int, entropy: bytes) -> Decision:  # noqa: C901, PLR0911, PLR0912 one arm each
    """Events and answer of one command, a function of its arguments alone.

    `now_ms` is the journal's clock and never goes back; `entropy` is 32 fresh bytes, from which names are made.
    """
    match command:
        case c.Advance():
            return Decision(matching.next_step(state, now_ms, Names(entropy)))
        case c.TaskPacked():
            return jobs.task_packed(state, command)
        case c.Commit():
            return leases.commit(state, command, now_ms)
        case c.Deliver():
            return leases.deliver(state, command, now_ms)
        case c.FailTask():
            return leases.fail_task(state, command, now_ms, Names(entropy))
        case c.ReturnLease():
            return leases.return_lease(state, command)
        case c.ReportInspection():
            return leases.report_inspection(state, command, now_ms)
        case c.ReportCheck():
            return leases.report_check(state, command, now_ms, Names(entropy))
        case c.Tick():
            return time_passing.tick(state, command, now_ms, Names(entropy))
        case c.Restart():
            return time_passing.restart(state, command)
        case (
            c.SubmitMapJob()
            | c.CancelJob()
            | c.DeleteJob()
            | c.ExpireJobs()
            | c.PackFailed()
            | c.ArchiveJobs()
            | c.RegisterBundle()
            | c.RecordForecasts()
        ):
            return _decide_job(state, command, now_ms, entropy)
        case c.SetPoolMode() | c.GrantCredits() | c.ReleaseCredits() | c.SetAllotment() | c.TopUpJob():
            return _decide_credits(state, command, now_ms)
        case c.RecordBlobs() | c.ClaimBlobs() | c.ForgetBlobs() | c.SetBlobQuota():
            return _decide_blobs(state, command, now_ms)
        case c.OpenSession() | c.CloseSession() | c.ChangeCapability() | c.DrainSession():
            return _decide_session(state, command, now_ms, entropy)
        case (
            c.StartJournal()
            | c.CreateAccount()
            | c.CreatePool()
            | c.IssueToken()
            | c.RevokeToken()
            | c.Enroll()
            | c.EnrollLocal()
            | c.RenewCertificate()
            | c.RevokeParty()
            | c.QuarantineWorker()
            | c.ReleaseWorker()
        ):
            return _decide_identity(state, command, now_ms, entropy)
        case c.AdmitAccount() | c.ExpelAccount() | c.ReleaseBundle():
            return _decide_door(state, command)
        case c.ReportReferee() | c.RecordComparison() | c.ComparisonFailed() | c.AcceptAssurance():
            return _decide_verification(state, command)
        case _:
            assert_never(command)


VerificationCommand = c.ReportReferee | c.RecordComparison | c.ComparisonFailed | c.AcceptAssurance


def _decide_verification(state: State, command: VerificationCommand) -> Decision:
    match command:
        case c.ReportReferee():
            return leases.report_referee(state, command)
        case c.RecordComparison():
            return judging.record_comparison(state, command)
        case c.ComparisonFailed():
            return judging.comparison_failed(state, command)
        case c.AcceptAssurance():
            return verifying.accept_assurance(state, command)
        case _:
            assert_never(command)


DoorCommand = c.AdmitAccount | c.ExpelAccount | c.ReleaseBundle


def _decide_door(state: State, command: DoorCommand) -> Decision:
    match command:
        case c.AdmitAccount():
            return admission.admit_account(state, command)
        case c.ExpelAccount():
            return admission.expel_account(state, command)
        case c.ReleaseBundle():
            return holding.release_bundle(state, command)
        case _:
            assert_never(command)


JobCommand = (
    c.SubmitMapJob
    | c.CancelJob
    | c.DeleteJob
    | c.ExpireJobs
    | c.PackFailed
    | c.ArchiveJobs
    | c.RegisterBundle
    | c.RecordForecasts
)


def _decide_job(state: State, command: JobCommand, now_ms: int, entropy: bytes) -> Decision:
    match command:
        case c.SubmitMapJob():
            return jobs.submit_map_job(state, command, now_ms, Names(entropy))
        case c.CancelJob():
            return jobs.cancel_job(state, command)
        case c.DeleteJob():
            return jobs.delete_job(state, command)
        case c.ExpireJobs():
            return jobs.expire_jobs(state, command)
        case c.PackFailed():
            return jobs.pack_failed(state, command, now_ms)
        case c.ArchiveJobs():
            return jobs.archive_jobs(state, command)
        case c.RegisterBundle():
            return bundles.register_bundle(state, command, Names(entropy))
        case c.RecordForecasts():
            return deferral.record_forecasts(state, command)
        case _:
            assert_never(command)


BlobCommand = c.RecordBlobs | c.ClaimBlobs | c.ForgetBlobs | c.SetBlobQuota


def _decide_blobs(state: State, command: BlobCommand, now_ms: int) -> Decision:
    match command:
        case c.RecordBlobs():
            return blobs.record_blobs(state, command, now_ms)
        case c.ClaimBlobs():
            return blobs.claim_blobs(state, command, now_ms)
        case c.ForgetBlobs():
            return blobs.forget_blobs(state, command, now_ms)
        case c.SetBlobQuota():
            return blobs.set_blob_quota(state, command)
        case _:
            assert_never(command)


CreditsCommand = c.SetPoolMode | c.GrantCredits | c.ReleaseCredits | c.SetAllotment | c.TopUpJob


def _decide_credits(state: State, command: CreditsCommand, now_ms: int) -> Decision:
    match command:
        case c.SetPoolMode():
            return treasury.set_pool_mode(state, command)
        case c.GrantCredits():
            return treasury.grant_credits(state, command)
        case c.ReleaseCredits():
            return treasury.release_credits(state, command)
        case c.SetAllotment():
            return treasury.set_allotment(state, command, now_ms)
        case c.TopUpJob():
            return treasury.top_up_job(state, command)
        case _:
            assert_never(command)


SessionCommand = c.OpenSession | c.CloseSession | c.ChangeCapability | c.DrainSession


def _decide_session(state: State, command: SessionCommand, now_ms: int, entropy: bytes) -> Decision:
    match command:
        case c.OpenSession():
            return sessions.open_session(state, command, now_ms, Names(entropy))
        case c.CloseSession():
            return sessions.close_session(state, command)
        case c.ChangeCapability():
            return sessions.change_capability(state, command)
        case c.DrainSession():
            return sessions.drain_session(state, command)
        case _:
            assert_never(command)


IdentityCommand = (
    c.StartJournal
    | c.CreateAccount
    | c.CreatePool
    | c.IssueToken
    | c.RevokeToken
    | c.Enroll
    | c.EnrollLocal
    | c.RenewCertificate
    | c.RevokeParty
    | c.QuarantineWorker
    | c.ReleaseWorker
)


def _decide_identity(state: State, command: IdentityCommand, now_ms: int, entropy: bytes) -> Decision:
    names = Names(entropy)
    match command:
        case c.StartJournal():
            return identity.start_journal(state, command, names)
        case c.CreateAccount():
            return identity.create_account(state, command, names)
        case c.CreatePool():
            return identity.create_pool(state, command, names)
        case c.IssueToken():
            return identity.issue_token(state, command, now_ms, names)
        case c.RevokeToken():
            return identity.revoke_token(state, command)
        case c.Enroll():
            return identity.enroll(state, command, now_ms, names)
        case c.EnrollLocal():
            return identity.enroll_local(state, command, now_ms, names)
        case c.RenewCertificate():
            return identity.renew_certificate(state, command, now_ms, names)
        case c.RevokeParty():
            return identity.revoke_party(state, command)
        case c.QuarantineWorker():
            return identity.quarantine_worker(state, command)
        case c.ReleaseWorker():
            return identity.release_worker(state, command)
        case _:
            assert_never(command)
