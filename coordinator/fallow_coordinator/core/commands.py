"""What the core can be asked: facts from outside, already parsed and authenticated, never a byte of content."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengeVerdict
from fallow.comparison import RowFinding
from fallow.credits import PoolMode
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, PoolId, SessionId, TaskId, TokenId
from fallow.job import DatasetBlock, JobOptions
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, Capability, Cause, HeldLease, RowFailure, Usage
from fallow_coordinator.core.events import PackedCandidate, RegionForecast
from fallow_coordinator.core.limits import UPLOAD_GRACE_MS


@dataclass(frozen=True, slots=True)
class StartJournal:
    """First command of a new journal: makes the operator's account and the default pool."""

    account_name: str
    pool_name: str


@dataclass(frozen=True, slots=True)
class Restart:
    """The writer came back: sessions are gone, leases are lengthened by the down time."""

    epoch: int
    down_time_ms: int


@dataclass(frozen=True, slots=True)
class MeasuringRules:
    """When devices are challenged, and how hard."""

    idle_ms: int = 60_000
    """A worker of a donation pool is challenged when it has held no lease for so long, and only while a certificate of
    it is missing."""
    idle_paid_ms: int = 1_000
    """The same in other pools, where only measured devices earn; there they are measured again at random."""
    target_ms: int = 1_500
    """How long a challenge takes a device that is as fast as it says."""
    fill_bytes_max: int = 512 * 1024 * 1024
    """Most memory that a challenge fills."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: what is due falls due."""

    measuring: MeasuringRules | None = None
    """None: no device is challenged."""


@dataclass(frozen=True, slots=True)
class Advance:
    """What work can start now? Asked by `turn.take_turn` after every command until nothing more can."""


# ------------------------------------------------------------------------------------------------- identity


@dataclass(frozen=True, slots=True)
class CreateAccount:
    name: str


@dataclass(frozen=True, slots=True)
class CreatePool:
    name: str
    account_id: AccountId
    closed: bool = False
    """True: only admitted accounts may submit there."""


@dataclass(frozen=True, slots=True)
class AdmitAccount:
    pool_id: PoolId
    account_id: AccountId


@dataclass(frozen=True, slots=True)
class ExpelAccount:
    pool_id: PoolId
    account_id: AccountId


@dataclass(frozen=True, slots=True)
class SetPoolMode:
    pool_id: PoolId
    mode: PoolMode


@dataclass(frozen=True, slots=True)
class IssueToken:
    """A join token; the engine keeps only the digest of its secret."""

    secret_digest: Digest
    account_id: AccountId | None
    role: Role
    tier: Tier | None
    pool_id: PoolId | None
    uses_max: int
    valid_for_ms: int
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RevokeToken:
    token_id: TokenId


@dataclass(frozen=True, slots=True)
class Enroll:
    """A key asks to become a party. The service has checked the request's own signature and the token's proof."""

    token_id: TokenId
    key_fingerprint: KeyFingerprint
    public_key: bytes
    name: str
    certificate_valid_for_ms: int
    machine_digest: bytes = b""


@dataclass(frozen=True, slots=True)
class EnrollLocal:
    """The operator's own parties on this machine: its client key, its worker, the blob service. No token."""

    key_fingerprint: KeyFingerprint
    public_key: bytes
    name: str
    role: Role
    tier: Tier | None
    certificate_valid_for_ms: int


@dataclass(frozen=True, slots=True)
class RenewCertificate:
    """An enrolled key, proven by a signature over a nonce, wants a fresh certificate."""

    key_fingerprint: KeyFingerprint
    certificate_valid_for_ms: int


@dataclass(frozen=True, slots=True)
class RevokeParty:
    party_id: PartyId
    reason: str


@dataclass(frozen=True, slots=True)
class QuarantineWorker:
    worker_id: PartyId
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseWorker:
    worker_id: PartyId


# ------------------------------------------------------------------------------------------------- credits


@dataclass(frozen=True, slots=True)
class GrantCredits:
    """The operator makes credits. The same `transfer_id` with the same facts changes nothing more."""

    account_id: AccountId
    microcredits: int
    note: str
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class ReleaseCredits:
    """The operator lets an account spend what its workers earned; 0: all that is pending."""

    account_id: AccountId
    microcredits: int
    note: str
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class SetAllotment:
    """What an account gets in a quota pool in each period; 0: nothing any more."""

    pool_id: PoolId
    account_id: AccountId
    microcredits: int
    period_ms: int


@dataclass(frozen=True, slots=True)
class TopUpJob:
    """The owner adds to a job's budget."""

    account_id: AccountId
    job_id: JobId
    microcredits: int
    transfer_id: bytes


# ------------------------------------------------------------------------------------------------- sessions


@dataclass(frozen=True, slots=True)
class OpenSession:
    worker_id: PartyId
    resume_token_digest: Digest | None
    """SHA-256 of the presented token; None on a first session."""
    next_resume_token_digest: Digest
    """SHA-256 of the token that the Welcome will carry."""
    capability: Capability
    window: int
    held_leases: tuple[HeldLease, ...]
    machine_digest: bytes = b""
    """Tells machines with copies of one key apart; empty: not told."""


@dataclass(frozen=True, slots=True)
class CloseSession:
    session_id: SessionId
    reason: str


@dataclass(frozen=True, slots=True)
class ChangeCapability:
    session_id: SessionId
    capability: Capability | None
    window: int


@dataclass(frozen=True, slots=True)
class DrainSession:
    """The worker takes no further leases."""

    session_id: SessionId


# ------------------------------------------------------------------------------------------------- blobs and bundles


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """What a verified receipt of the blob service says."""

    blob: BlobReference
    rows: int = 0
    """0: not a row block."""
    root: Digest | None = None
    schema_digest: Digest | None = None
    size_feature_sums: tuple[int, ...] = ()
    rows_failed: int = 0


@dataclass(frozen=True, slots=True)
class RecordBlobs:
    account_id: AccountId
    blobs: tuple[StoredBlob, ...]
    grace_ms: int = UPLOAD_GRACE_MS


@dataclass(frozen=True, slots=True)
class ClaimBlobs:
    """The account was told that it has these blobs and goes on to use them: the grace of old records begins anew."""

    account_id: AccountId
    digests: tuple[Digest, ...]
    grace_ms: int = UPLOAD_GRACE_MS


@dataclass(frozen=True, slots=True)
class ForgetBlobs:
    """Blobs to which nothing refers in the views at `view_sequence`: does the state refer to them?"""

    digests: tuple[Digest, ...]
    view_sequence: int
    grace_ms: int = UPLOAD_GRACE_MS
    """Age below which a recorded upload counts as referred to."""


@dataclass(frozen=True, slots=True)
class SetBlobQuota:
    account_id: AccountId
    bytes_max: int
    """0: the default."""


@dataclass(frozen=True, slots=True)
class RegisterBundle:
    """The service has parsed the manifest's frame; its bytes travel as a payload under `bundle_digest`."""

    account_id: AccountId
    party_id: PartyId
    bundle_digest: Digest
    files: tuple[BlobReference, ...]
    input_schema_digest: Digest
    output_schema_digest: Digest
    size_feature_count: int
    """Size features of the input schema."""
    bytes_feature_index: int
    """Which size feature counts bytes, or -1: cost then follows block bytes."""
    output_row_bytes: int = 0
    """Bytes a row of its output takes, as far as the schema fixes them: tasks are cut so that outputs fit a block."""


@dataclass(frozen=True, slots=True)
class ReleaseBundle:
    """An operator lets jobs use a held bundle again."""

    bundle_digest: Digest


# ------------------------------------------------------------------------------------------------- jobs


@dataclass(frozen=True, slots=True)
class SubmitMapJob:
    """Inline blocks travel as payloads under their digests, and come with `inline_blocks` facts."""

    account_id: AccountId
    party_id: PartyId
    idempotency_key: bytes
    request_digest: Digest
    """SHA-256 of the exact request: the same key with another request is a conflict."""
    bundle_digest: Digest
    blocks: tuple[DatasetBlock, ...]
    inline_blocks: tuple[StoredBlob, ...]
    """One for each inline block: what the service found in its frame."""
    data_class: DataClass
    pool_id: PoolId | None
    title: str
    options: JobOptions
    kept: BlobReference | None


@dataclass(frozen=True, slots=True)
class CancelJob:
    account_id: AccountId
    job_id: JobId


@dataclass(frozen=True, slots=True)
class DeleteJob:
    """The owner lets go of a finished job's results, dataset and kept columns."""

    account_id: AccountId
    job_id: JobId
    archived: bool
    """True: the job has left the state, and the views show it as this account's, ended and not deleted."""


@dataclass(frozen=True, slots=True)
class ExpireJobs:
    """Jobs of which the views say that their retention is over."""

    jobs: tuple[tuple[AccountId, JobId], ...]


@dataclass(frozen=True, slots=True)
class TaskPacked:
    """The engine packed a task's rows into a fresh block (in process when inline, else in the blob service)."""

    task_id: TaskId
    pack_number: int
    """Which packing of the task this answers; an older one changes nothing."""
    input: BlobReference
    inline: bool
    candidates: tuple[PackedCandidate, ...] = ()
    """Of a referee's task, as is the next one."""
    execution_classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackFailed:
    task_id: TaskId
    pack_number: int
    reason: str
    retryable: bool
    """False: a source is gone; the job fails. True: the blob service was away; tried again after a while."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A signed commitment; the service has verified the signature and, inline, the root over the very bytes."""

    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    output_root: Digest
    rows: int
    output: BlobReference
    inline: bool
    failures: tuple[RowFailure, ...]
    usage: Usage
    execution_class: str
    message_digest: Digest
    """SHA-256 of the exact signed bytes."""
    signature: bytes
    sequence: int
    """The message's number in its session: part of what was signed."""
    stored: StoredBlob | None = None
    """What the service found in an inline output's frame: rows, root, schema, failed rows. Required when inline."""
    elapsed_ms: int = 0
    """From the lease's sending to this message, in one and the same session; 0: not known."""
    round_trip_ms: int = 0
    """The shortest that was seen in this session; 0: not known."""


@dataclass(frozen=True, slots=True)
class Deliver:
    """The blob service's receipt for a committed output, verified by the service."""

    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    stored: StoredBlob


@dataclass(frozen=True, slots=True)
class ReportInspection:
    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    report: InspectionReport
    usage: Usage
    message_digest: Digest
    signature: bytes
    sequence: int


@dataclass(frozen=True, slots=True)
class ReportCheck:
    """An operator worker's verdict on the answer to a challenge."""

    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    verdict: ChallengeVerdict


@dataclass(frozen=True, slots=True)
class ReportReferee:
    """What an operator worker found when it worked rows out itself; the service has verified the signature."""

    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    own_root: Digest
    findings: tuple[RowFinding, ...]
    """One for each row of the lease, in order."""
    execution_class: str
    usage: Usage
    message_digest: Digest
    signature: bytes
    sequence: int


@dataclass(frozen=True, slots=True)
class RecordComparison:
    """An audit's rows were compared with those that they check."""

    job_id: JobId
    task_id: TaskId
    equal: tuple[bool, ...]
    """One for each row of the task, in order."""


@dataclass(frozen=True, slots=True)
class ComparisonFailed:
    """An audit's rows cannot be compared: a block of them is gone or broken."""

    job_id: JobId
    task_id: TaskId
    reason: str


@dataclass(frozen=True, slots=True)
class AcceptAssurance:
    """The owner takes a verifying job's rows with the checks that were made by now."""

    account_id: AccountId
    job_id: JobId


@dataclass(frozen=True, slots=True)
class FailTask:
    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class ReturnLease:
    session_id: SessionId
    worker_id: PartyId
    lease_id: LeaseId
    fence: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class RecordForecasts:
    """Grams of CO₂ per kWh of the coming hours where workers are, from `from_ms` on, which begins an hour."""

    from_ms: int
    forecasts: tuple[RegionForecast, ...]
    source: str


@dataclass(frozen=True, slots=True)
class ArchiveJobs:
    """The follower's views stand at this sequence: finished jobs up to it need no place in memory."""

    view_sequence: int


Command = (
    StartJournal
    | Restart
    | Tick
    | Advance
    | CreateAccount
    | CreatePool
    | AdmitAccount
    | ExpelAccount
    | SetPoolMode
    | GrantCredits
    | ReleaseCredits
    | SetAllotment
    | TopUpJob
    | IssueToken
    | RevokeToken
    | Enroll
    | EnrollLocal
    | RenewCertificate
    | RevokeParty
    | QuarantineWorker
    | ReleaseWorker
    | OpenSession
    | CloseSession
    | ChangeCapability
    | DrainSession
    | RecordBlobs
    | ClaimBlobs
    | ForgetBlobs
    | SetBlobQuota
    | RegisterBundle
    | ReleaseBundle
    | SubmitMapJob
    | CancelJob
    | DeleteJob
    | ExpireJobs
    | TaskPacked
    | PackFailed
    | Commit
    | Deliver
    | ReportInspection
    | ReportCheck
    | FailTask
    | ReturnLease
    | ArchiveJobs
    | RecordForecasts
    | ReportReferee
    | RecordComparison
    | ComparisonFailed
    | AcceptAssurance
)
