"""What did happen. Events alone change state; each shipped shape is for ever (`tests/golden_journals`).

Integers only in what `evolve` reads; an event's moment is its record's `at_ms`, by a clock that never goes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengeKind, ChallengePlan
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, PoolId, SessionId, TaskId, TokenId
from fallow.job import DatasetBlock, Footprint, JobOptions, JobState
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, Capability, Cause, RowFailure, TaskKind, Usage
from fallow_coordinator.core import tolerance_events, verification_events
from fallow_coordinator.core.duplicate_events import Agreement as Agreement  # noqa: PLC0414 - told as this module's
from fallow_coordinator.core.duplicate_events import LateLeaseSettled as LateLeaseSettled  # noqa: PLC0414
from fallow_coordinator.core.verification_events import EvidenceRow


@dataclass(frozen=True, slots=True)
class JournalStarted:
    journal_id: bytes


@dataclass(frozen=True, slots=True)
class Restarted:
    """All sessions are closed; every lease's deadline moves by the down time."""

    epoch: int
    down_time_ms: int


@dataclass(frozen=True, slots=True)
class AccountCreated:
    account_id: AccountId
    name: str


@dataclass(frozen=True, slots=True)
class PoolCreated:
    pool_id: PoolId
    account_id: AccountId
    name: str
    mode: str
    policy: str
    closed: bool = False
    """True: only admitted accounts submit there."""


@dataclass(frozen=True, slots=True)
class AccountAdmitted:
    """The account may submit to the closed pool."""

    pool_id: PoolId
    account_id: AccountId


@dataclass(frozen=True, slots=True)
class AccountExpelled:
    """The account may not submit there any more; its jobs go on."""

    pool_id: PoolId
    account_id: AccountId


@dataclass(frozen=True, slots=True)
class PoolModeChanged:
    pool_id: PoolId
    mode: str


@dataclass(frozen=True, slots=True)
class CreditsGranted:
    """The operator makes credits for an account; `transfer_id` makes repeating harmless."""

    account_id: AccountId
    microcredits: int
    note: str
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class CreditsReleased:
    """What an account's workers earned may be spent from here on."""

    account_id: AccountId
    microcredits: int
    note: str
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class AllotmentSet:
    """What an account gets in a quota pool in each period; a fresh period begins. 0: nothing any more."""

    pool_id: PoolId
    account_id: AccountId
    microcredits: int
    period_ms: int
    renews_at_ms: int
    granted_microcredits: int
    lapsed_microcredits: int
    """What was left of the period before."""


@dataclass(frozen=True, slots=True)
class AllotmentRenewed:
    """A period is over and the next begins."""

    pool_id: PoolId
    account_id: AccountId
    renews_at_ms: int
    granted_microcredits: int
    lapsed_microcredits: int


@dataclass(frozen=True, slots=True)
class JobFunded:
    """Its owner adds to its budget."""

    job_id: JobId
    microcredits: int
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class TokenIssued:
    token_id: TokenId
    secret_digest: Digest
    account_id: AccountId | None
    """None: joining makes an account of its own."""
    role: Role
    tier: Tier | None
    pool_id: PoolId
    uses_max: int
    expires_at_ms: int
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TokenRevoked:
    token_id: TokenId


@dataclass(frozen=True, slots=True)
class PartyEnrolled:
    """`token_id` is None for the operator's own parties; else one use of the token is burnt in the same event."""

    party_id: PartyId
    key_fingerprint: KeyFingerprint
    public_key: bytes
    account_id: AccountId
    role: Role
    tier: Tier | None
    pool_id: PoolId
    token_id: TokenId | None
    name: str
    machine_digest: bytes


@dataclass(frozen=True, slots=True)
class CertificateIssued:
    party_id: PartyId
    serial: bytes
    not_after_ms: int


@dataclass(frozen=True, slots=True)
class PartyRevoked:
    party_id: PartyId
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerQuarantined:
    worker_id: PartyId
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerReleased:
    worker_id: PartyId


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """The worker's one session. Leases not in `kept` that the worker held end by their own events."""

    session_id: SessionId
    worker_id: PartyId
    resume_token_digest: Digest
    capability: Capability
    window: int
    kept: tuple[LeaseId, ...]
    presented_token_digest: Digest | None = None
    """The token the worker showed: good until it shows the new one, because a Welcome may be lost on its way."""
    machine_digest: bytes = b""
    """Of the machine that it runs on; empty: not told."""


@dataclass(frozen=True, slots=True)
class SessionClosed:
    session_id: SessionId
    reason: str


@dataclass(frozen=True, slots=True)
class CapabilityReported:
    session_id: SessionId
    capability: Capability | None
    window: int


@dataclass(frozen=True, slots=True)
class WorkerStruck:
    """A lease of the worker ended by its own fault."""

    worker_id: PartyId
    strikes: int
    """So many by now."""
    cool_ms: int
    """It gets nothing for so long from now; 0: goes on."""


@dataclass(frozen=True, slots=True)
class WorkerWarmed:
    """Its rest is over."""

    worker_id: PartyId


@dataclass(frozen=True, slots=True)
class BlobRecorded:
    account_id: AccountId
    blob: BlobReference
    rows: int
    root: Digest | None
    schema_digest: Digest | None
    size_feature_sums: tuple[int, ...]
    rows_failed: int


@dataclass(frozen=True, slots=True)
class BlobsForgotten:
    """Nothing refers to these blobs: no account has them from here on, and the blob service may delete them."""

    digests: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class BlobQuotaSet:
    account_id: AccountId
    bytes_max: int
    """0: the default."""


@dataclass(frozen=True, slots=True)
class BundleRegistered:
    account_id: AccountId
    bundle_digest: Digest
    files: tuple[BlobReference, ...]
    input_schema_digest: Digest
    output_schema_digest: Digest
    size_feature_count: int
    bytes_feature_index: int
    output_row_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BundleInspected:
    """Accepted or refused, as the report says; `report.inspected_seconds` is told, never decided on."""

    bundle_digest: Digest
    task_id: TaskId
    worker_id: PartyId
    report: InspectionReport


@dataclass(frozen=True, slots=True)
class BundleHeld:
    """It crashed workers of two accounts, and an operator's worker found the same; nobody's record is hurt."""

    bundle_digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class BundleCrashed:
    """A worker of this account says that it crashed."""

    bundle_digest: Digest
    account_id: AccountId
    reason: str


@dataclass(frozen=True, slots=True)
class BundleCleared:
    """Inspected once more because of such claims, and found well: they count no more."""

    bundle_digest: Digest
    task_id: TaskId
    worker_id: PartyId


@dataclass(frozen=True, slots=True)
class InspectionRowsGiven:
    """An inspection that claims brought about also runs these rows: the block of the lease that the last one names."""

    task_id: TaskId
    input: BlobReference
    inline: bool
    rows: int


@dataclass(frozen=True, slots=True)
class BundleReleased:
    """An operator lets jobs use it, whatever was claimed."""

    bundle_digest: Digest


@dataclass(frozen=True, slots=True)
class JobSubmitted:
    job_id: JobId
    account_id: AccountId
    party_id: PartyId
    pool_id: PoolId
    idempotency_key: bytes
    request_digest: Digest
    bundle_digest: Digest
    blocks: tuple[DatasetBlock, ...]
    size_feature_sums: tuple[int, ...]
    rows: int
    data_class: DataClass
    title: str
    options: JobOptions
    kept: BlobReference | None
    policy: str
    price_microcredits: int
    held_microcredits: int = 0
    """Its budget, which its account can spend on nothing else until it ends."""
    block_size_sums: tuple[tuple[int, ...], ...] = ()
    """Sums of the size features of each block, in order; empty in events from before they were recorded."""


@dataclass(frozen=True, slots=True)
class JobStateChanged:
    job_id: JobId
    state: JobState
    reason: str
    reason_code: str
    due_ms: int = 0
    """As a job begins to queue: its place among the jobs of its account; 0: unchanged."""
    cost_permille: int = 0
    """As a job begins to queue: its cost in thousandths of what inspection found; 0: unchanged."""


@dataclass(frozen=True, slots=True)
class JobArchived:
    """Finished and in the views: leaves the state."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class JobDeleted:
    """A finished job's results, dataset and kept columns are let go; the job may have left the state before."""

    job_id: JobId
    account_id: AccountId
    reason: str


@dataclass(frozen=True, slots=True)
class TaskCreated:
    """`spans` are half-open ranges of job positions, in packing order; empty for inspections."""

    task_id: TaskId
    kind: TaskKind
    job_id: JobId | None
    bundle_digest: Digest
    pool_id: PoolId
    spans: tuple[tuple[int, int], ...]
    unit_micros: int
    challenge_task_id: TaskId | None = None
    """Of a check: the challenge that it checks."""
    share_key: int = 0
    """The account's place in the fair order from here on (`shares`); 0: unchanged."""
    checks: tuple[EvidenceRow, ...] = ()
    """Of an audit, and of a referee's task: the rows that it checks, one for each of its own, in order."""
    corrects: int = 0
    """Of rows that are done again: the job's result that it corrects; 0: none."""


@dataclass(frozen=True, slots=True)
class PackRequested:
    task_id: TaskId
    pack_number: int


@dataclass(frozen=True, slots=True)
class PackedCandidate:
    """Output rows of workers in a fresh block, for a referee to put beside its own."""

    block: BlobReference
    inline: bool
    rows: tuple[int, ...]
    """Rows of the task that the block's rows answer, rising."""
    class_numbers: tuple[int, ...]
    """The execution class of each: its place in the event's `execution_classes`."""


@dataclass(frozen=True, slots=True)
class TaskInputPacked:
    task_id: TaskId
    pack_number: int
    input: BlobReference
    inline: bool
    candidates: tuple[PackedCandidate, ...] = ()
    """Of a referee's task, as is the next one."""
    execution_classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackingFailed:
    """The blob service could not pack just now; asked again from `retry_at_ms` on, with the next number."""

    task_id: TaskId
    pack_number: int
    retry_at_ms: int
    reason: str


@dataclass(frozen=True, slots=True)
class LeaseGranted:
    lease_id: LeaseId
    task_id: TaskId
    worker_id: PartyId
    session_id: SessionId
    fence: int
    deadline_ms: int
    runtime_max_ms: int
    price_microcredits_per_unit: int = 0
    reserved_microcredits: int = 0
    """Most that it can cost: its job can spend it on no other lease while this one lives."""
    duplicate: bool = False
    """True: the task's second live lease, because its first is late."""
    share_key: int = 0
    """Of a duplicate: the account's place in the fair order from here on (`shares`); 0: unchanged."""


class LeaseOutcome(StrEnum):
    """How a lease ended without settling."""

    EXPIRED = "expired"
    LOST = "lost"
    """The worker went away, or came back without it."""
    RETURNED = "returned"
    FAILED = "failed"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    lease_id: LeaseId
    outcome: LeaseOutcome
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class CommitmentRecorded:
    """Evidence: who is bound to which root, with the exact bytes' digest and the signature over them."""

    lease_id: LeaseId
    output_root: Digest
    rows: int
    output: BlobReference
    inline: bool
    failures: tuple[RowFailure, ...]
    rows_failed: int
    usage: Usage
    execution_class: str
    message_digest: Digest
    signature: bytes
    sequence: int
    millijoules: int = 0
    """What is believed of `usage`'s energy."""
    energy_measured: bool = False


@dataclass(frozen=True, slots=True)
class TaskSettled:
    """The task's rows are delivered by this lease's commitment, and by no other."""

    task_id: TaskId
    lease_id: LeaseId
    cursor: int
    """The job's result number, from 1."""
    rows: int
    rows_failed: int
    microcredits: int
    """What the job pays for the rows done."""
    speed_milliunits_per_s: int = 0
    """The worker's speed with the bundle from here on (`speeds`); 0: unchanged."""
    released: bool = False
    """True: the worker's account may spend it at once; false: it is pending."""
    contribution_microcredits: int = 0
    """Recorded for the worker's account where nobody pays."""
    footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
    worked_unit_micros: int = 0
    """What the task was by the time it took on a measured device (`learning`); 0: nothing can be said."""


@dataclass(frozen=True, slots=True)
class BundleCostLearned:
    """What accepted work has taught of a bundle's cost, in thousandths of what inspection found; for jobs to come."""

    bundle_digest: Digest
    cost_permille: int


@dataclass(frozen=True, slots=True)
class TaskAbandoned:
    """Nobody could do it: all its rows fail with this reason, as result `cursor`."""

    task_id: TaskId
    cursor: int
    rows: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class TaskDropped:
    """Not needed any more: its job ended."""

    task_id: TaskId


@dataclass(frozen=True, slots=True)
class ChallengeIssued:
    """A device is asked to show what it can do. The task that carries it, and its lease, come right after."""

    task_id: TaskId
    worker_id: PartyId
    device_digest: Digest
    """The identity of the device at this moment."""
    plan: ChallengePlan


@dataclass(frozen=True, slots=True)
class ChallengeAnswered:
    """The device committed to an answer in time; it counts once it is checked."""

    task_id: TaskId
    elapsed_ms: int
    """From lease sent to commitment received, by the coordinator's clock, less `round_trip_ms`."""
    round_trip_ms: int
    units_milli_per_s: int
    """The speed that follows; 0 for memory."""


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """An operator worker found that the answer holds: the device has a certificate, or a fuller one."""

    task_id: TaskId
    """Of the challenge."""
    checked_by: PartyId
    check_lease_id: LeaseId
    worker_id: PartyId
    device_id: str
    device_digest: Digest
    kind: ChallengeKind
    units_milli_per_s: int
    memory_bytes: int
    again_at_ms: int
    expires_at_ms: int
    answer: Digest
    """Of the answer's block."""


@dataclass(frozen=True, slots=True)
class DeviceCertificateEnded:
    worker_id: PartyId
    device_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ChallengeEnded:
    """A challenge came to nothing: given back, lost, too slow, or found wrong."""

    task_id: TaskId
    worker_id: PartyId
    device_id: str
    blamed: bool
    """The device, or who speaks for it, is to blame."""
    reason: str
    retry_after_ms: int


# ------------------------------------------------------------------------------------------------- carbon


@dataclass(frozen=True, slots=True)
class RegionForecast:
    """Grams of CO₂ per kWh in a region, hour by hour."""

    region: str
    """Lower case; empty: every region that is not listed."""
    grams_per_kwh: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ForecastsRecorded:
    """What electricity will emit where workers are; replaces what was known. `from_ms` begins an hour."""

    from_ms: int
    forecasts: tuple[RegionForecast, ...]
    source: str


@dataclass(frozen=True, slots=True)
class CarbonPlanned:
    """Work like this job's, of the same lane, goes to no worker of these regions until the next plan."""

    job_id: JobId
    regions_closed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class JobDeferred:
    """The job waits for cleaner electricity: nothing of it is cut or leased. A later one replaces it."""

    job_id: JobId
    until_ms: int


@dataclass(frozen=True, slots=True)
class JobResumed:
    """The job waits no more."""

    job_id: JobId


Event = (
    JournalStarted
    | Restarted
    | AccountCreated
    | PoolCreated
    | AccountAdmitted
    | AccountExpelled
    | PoolModeChanged
    | CreditsGranted
    | CreditsReleased
    | AllotmentSet
    | AllotmentRenewed
    | JobFunded
    | TokenIssued
    | TokenRevoked
    | PartyEnrolled
    | CertificateIssued
    | PartyRevoked
    | WorkerQuarantined
    | WorkerReleased
    | SessionOpened
    | SessionClosed
    | CapabilityReported
    | WorkerStruck
    | WorkerWarmed
    | BlobRecorded
    | BlobsForgotten
    | BlobQuotaSet
    | BundleRegistered
    | BundleInspected
    | BundleHeld
    | BundleCrashed
    | BundleCostLearned
    | BundleCleared
    | BundleReleased
    | InspectionRowsGiven
    | JobSubmitted
    | JobStateChanged
    | JobArchived
    | JobDeleted
    | TaskCreated
    | PackRequested
    | TaskInputPacked
    | PackingFailed
    | LeaseGranted
    | LeaseEnded
    | CommitmentRecorded
    | TaskSettled
    | LateLeaseSettled
    | TaskAbandoned
    | TaskDropped
    | ChallengeIssued
    | ChallengeAnswered
    | DeviceMeasured
    | DeviceCertificateEnded
    | ChallengeEnded
    | ForecastsRecorded
    | CarbonPlanned
    | JobDeferred
    | JobResumed
    | verification_events.VerificationEvent
    | tolerance_events.ToleranceEvent
)
