"""What follows from events once they are durable. Derived, never stored: losing one is repaired by reconciliation."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import Digest, JobId, LeaseId, PartyId, SessionId, TaskId


@dataclass(frozen=True, slots=True)
class SendLease:
    session_id: SessionId
    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class SendUploadOffer:
    session_id: SessionId
    lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class SendSettled:
    session_id: SessionId
    lease_id: LeaseId
    fence: int
    microcredits: int


@dataclass(frozen=True, slots=True)
class SendRevoked:
    session_id: SessionId
    lease_id: LeaseId
    fence: int
    reason: str


@dataclass(frozen=True, slots=True)
class SendStanding:
    """Something has changed about what is known of a worker's device."""

    session_id: SessionId
    worker_id: PartyId
    device_id: str


@dataclass(frozen=True, slots=True)
class EndSession:
    """Closes the stream of a session: replaced, revoked or quarantined."""

    session_id: SessionId
    reason_code: str
    reason: str


@dataclass(frozen=True, slots=True)
class PackTask:
    """Pack the task's rows into a fresh block, then submit TaskPacked or PackFailed."""

    task_id: TaskId
    pack_number: int


@dataclass(frozen=True, slots=True)
class CompareRows:
    """An audit has settled: compare its rows with those that they check, then submit RecordComparison."""

    job_id: JobId
    task_id: TaskId


@dataclass(frozen=True, slots=True)
class DropInput:
    """A lease is over: its packed input in the blob service can go."""

    input: Digest


@dataclass(frozen=True, slots=True)
class WakeWatchers:
    """Something about this job changed."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class WakeBundleWatchers:
    """A bundle's state changed."""

    bundle_digest: bytes


@dataclass(frozen=True, slots=True)
class EndParty:
    """The party's certificate counts no more: end its live streams and calls."""

    party_id: PartyId


Effect = (
    SendLease
    | SendUploadOffer
    | SendSettled
    | SendRevoked
    | SendStanding
    | EndSession
    | PackTask
    | CompareRows
    | DropInput
    | WakeWatchers
    | WakeBundleWatchers
    | EndParty
)
