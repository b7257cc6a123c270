"""Everything the coordinator knows, changed by `evolve` alone. What is finished and in the views leaves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from fallow.bundle import InspectionReport
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, PoolId, SessionId, TaskId, TokenId
from fallow.job import DatasetBlock, JobOptions, JobState, TaskResult
from fallow.ranges import RangeSet
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, Capability, Cause, RowFailure, TaskKind
from fallow_coordinator.core.commands import StoredBlob
from fallow_coordinator.core.events import LeaseOutcome

ANY_POOL = PoolId("")
"""Stands for the pool where trust does not depend on one: inspections go to operators' workers of every pool."""


class GroupKey(NamedTuple):
    """Workers that may do the same work."""

    kind: TaskKind
    pool_id: PoolId
    tier: Tier


class LaneKey(NamedTuple):
    """Tasks that may go to the same groups; inspections have no data class."""

    kind: TaskKind
    pool_id: PoolId
    data_class: DataClass | None


@dataclass(slots=True)
class Account:
    """A person or organisation and what is theirs."""

    account_id: AccountId
    name: str
    blobs: dict[Digest, StoredBlob] = field(default_factory=dict[Digest, StoredBlob])
    """Blobs that the blob service holds for this account."""
    blobs_recorded_at_ms: dict[Digest, int] = field(default_factory=dict[Digest, int])
    """When each of them was last recorded or claimed."""
    blob_bytes: int = 0
    """Sum of their lengths."""
    blob_bytes_max: int = 0
    """What an operator allows; 0: the default."""
    outputs: dict[Digest, tuple[int, int]] = field(default_factory=dict[Digest, tuple[int, int]])
    """(length in bytes, results that refer to it) of each output block of its unarchived jobs."""
    bundles: dict[Digest, None] = field(default_factory=dict[Digest, None])
    jobs_unfinished: int = 0
    blocks_unfinished: int = 0
    """Dataset blocks of its unfinished jobs."""
    idempotency_keys: int = 0
    inspected_last: int = 0
    """Journal sequence at which a bundle of its own was last leased for inspection; 0: never."""


@dataclass(slots=True)
class Pool:
    """Workers under one mode and one rule of trust."""

    pool_id: PoolId
    account_id: AccountId
    name: str
    mode: str
    policy: str


@dataclass(slots=True)
class Token:
    """A join token; revoked ones stay, so that they are told from unknown ones."""

    token_id: TokenId
    secret_digest: Digest
    account_id: AccountId | None
    role: Role
    tier: Tier | None
    pool_id: PoolId
    uses_max: int
    uses: int
    expires_at_ms: int
    tags: tuple[str, ...]
    revoked: bool = False


@dataclass(slots=True)
class Party:
    """Anyone with a certificate."""

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
    enrolled_at_ms: int
    not_after_ms: int = 0
    """End of the newest certificate."""
    serial: bytes = b""
    revoked: bool = False
    revoked_reason: str = ""


@dataclass(slots=True)
class Worker:
    """A party of role worker: its session, what it can do, what it holds."""

    worker_id: PartyId
    account_id: AccountId
    pool_id: PoolId
    tier: Tier
    session_id: SessionId | None = None
    """The one open session, or None."""
    sessions: int = 0
    """How many it ever opened."""
    resume_token_digest: Digest | None = None
    """Of the token that the newest Welcome carried."""
    presented_token_digest: Digest | None = None
    """Of the token it showed last: counts too, because a Welcome may be lost on its way."""
    closed_at_ms: int = 0
    grace_until_ms: int = 0
    """Until then the leases of the closed session stay; 0 while open or when none are held."""
    capability: Capability = field(default_factory=Capability)
    window: int = 0
    slots: int = 1
    quarantined: bool = False
    quarantine_reason: str = ""
    leases: dict[LeaseId, None] = field(default_factory=dict[LeaseId, None])
    """All live leases it holds, and no other."""
    unit_micros_held: int = 0
    rows_settled: int = 0
    tasks_settled: int = 0
    groups: tuple[GroupKey, ...] = ()
    """Where it is counted now; empty while it is away or quarantined."""

    @property
    def free(self) -> int:
        """Leases it may be given now."""
        return max(0, self.window - len(self.leases)) if self.groups else 0

    @property
    def load(self) -> int:
        """Leases held for each thousand slots."""
        return len(self.leases) * 1_000 // self.slots


@dataclass(slots=True)
class WorkerGroup:
    """Connected workers that may do the same work."""

    members: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    free: list[tuple[int, PartyId]] = field(default_factory=list[tuple[int, PartyId]])
    """(load, worker) of those with free window, sorted."""
    free_total: int = 0
    """Sum of free windows."""
    ahead_total: int = 0
    """Tasks worth keeping packed ahead: one for each slot that takes work."""
    window_total: int = 0
    """Sum of windows, free or not."""


@dataclass(slots=True)
class Bundle:
    """A bundle, once for all accounts that own it."""

    bundle_digest: Digest
    files: tuple[BlobReference, ...]
    input_schema_digest: Digest
    output_schema_digest: Digest
    size_feature_count: int
    bytes_feature_index: int
    output_row_bytes: int
    owners: dict[AccountId, None] = field(default_factory=dict[AccountId, None])
    report: InspectionReport | None = None
    inspection_task_id: TaskId | None = None
    obstacle: str = ""
    """Why its last inspection came to nothing; empty when it did not."""
    held_reason: str = ""
    crashed_accounts: dict[AccountId, None] = field(default_factory=dict[AccountId, None])
    jobs: dict[JobId, None] = field(default_factory=dict[JobId, None])
    """Unfinished jobs that use it."""


@dataclass(slots=True)
class Job:
    """A job until it is archived. Rows from 0 to `next_row` are cut into tasks; each is done once or in a live task."""

    job_id: JobId
    account_id: AccountId
    party_id: PartyId
    pool_id: PoolId
    bundle_digest: Digest
    blocks: tuple[DatasetBlock, ...]
    row_starts: tuple[int, ...]
    """First job position of each block, and the number of rows at the end."""
    byte_starts: tuple[int, ...]
    """Sum of the lengths of the blocks before each, and of all at the end."""
    size_feature_sums: tuple[int, ...]
    rows: int
    data_class: DataClass
    title: str
    options: JobOptions
    kept: BlobReference | None
    policy: str
    price_microcredits: int
    submitted_at_ms: int
    state: JobState = JobState.PENDING
    reason: str = ""
    reason_code: str = ""
    finished_at_ms: int = 0
    next_row: int = 0
    tasks: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """Live tasks, and no other."""
    tasks_created: int = 0
    done: RangeSet = field(default_factory=RangeSet)
    rows_failed: int = 0
    rows_leased: int = 0
    tasks_settled: int = 0
    microcredits: int = 0
    results: list[TaskResult] = field(default_factory=list[TaskResult])
    """Result n has cursor n + 1; none are left once the job is deleted."""
    deleted_at_ms: int = 0
    """0: its results, dataset and kept columns are there."""
    deleted_reason: str = ""
    parked: bool = False
    """Its waiting and ready tasks stand outside the lane; changed by `parking` alone."""

    @property
    def lane(self) -> LaneKey:
        """Where its tasks queue."""
        return LaneKey(TaskKind.MAP, self.pool_id, self.data_class)


class TaskPhase(StrEnum):
    """Where a live task is."""

    WAITING = "waiting"
    """For its next packing, from `not_before_ms` on."""
    PACKING = "packing"
    READY = "ready"
    LEASED = "leased"


@dataclass(slots=True)
class Task:
    """Live work. The fence counts its leases; the pack number counts its packings; both only grow."""

    task_id: TaskId
    number: int
    kind: TaskKind
    job_id: JobId | None
    bundle_digest: Digest
    pool_id: PoolId
    lane: LaneKey
    spans: tuple[tuple[int, int], ...]
    rows: int
    unit_micros: int
    phase: TaskPhase
    not_before_ms: int = 0
    pack_number: int = 0
    pack_requested_at_ms: int = 0
    pack_failures: int = 0
    """In a row."""
    input: BlobReference | None = None
    input_inline: bool = False
    fence: int = 0
    lease_id: LeaseId | None = None
    attempts: int = 0
    """Failures that were somebody's fault."""
    losses: int = 0
    avoid: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    """Workers on which it failed."""
    last_cause: Cause = Cause.PLATFORM
    last_reason: str = ""


@dataclass(frozen=True, slots=True)
class CommitmentFacts:
    """What a lease's worker is bound to."""

    output_root: Digest
    rows: int
    output: BlobReference
    inline: bool
    failures: tuple[RowFailure, ...]
    rows_failed: int
    node: int


@dataclass(slots=True)
class Lease:
    """A live lease: `fence` equals its task's."""

    lease_id: LeaseId
    task_id: TaskId
    worker_id: PartyId
    session_id: SessionId
    """The worker's session that knows of it: where it was granted or last kept."""
    fence: int
    granted_at_ms: int
    deadline_ms: int
    runtime_max_ms: int
    commitment: CommitmentFacts | None = None


@dataclass(frozen=True, slots=True)
class EndedLease:
    """A lease that is over, remembered to answer latecomers."""

    task_id: TaskId
    job_id: JobId | None
    worker_id: PartyId
    fence: int
    outcome: LeaseOutcome | None
    """None: it settled."""
    commitment: CommitmentFacts | None
    input: Digest | None = None
    """Its input in the blob service, which nobody needs any more; None when it was inline or had none."""


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """Which job an account's key made."""

    request_digest: Digest
    job_id: JobId
    at_ms: int


@dataclass(slots=True)
class Lane:
    """Work that may go to the same groups of workers."""

    accounts: dict[AccountId, dict[JobId, None]] = field(default_factory=dict[AccountId, dict[JobId, None]])
    """Jobs with uncut rows, first come first; the account whose turn it is stands first."""
    waiting: list[tuple[int, int, TaskId]] = field(default_factory=list[tuple[int, int, TaskId]])
    """(not before, number, task), sorted."""
    packing: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    ready: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """First packed, first."""
    jobs: int = 0
    """Unfinished jobs and live inspections."""


@dataclass(slots=True)
class State:
    """The whole. Two states folded from the same records are equal, orders of dictionaries included."""

    journal_id: bytes = b""
    epoch: int = 0
    sequence: int = 0
    """Of the newest event."""
    clock_ms: int = 0
    """Moment of the newest event."""
    operator_account_id: AccountId = field(default=AccountId(""))
    """The first account."""
    default_pool_id: PoolId = field(default=PoolId(""))
    """The first pool."""
    accounts: dict[AccountId, Account] = field(default_factory=dict[AccountId, Account])
    pools: dict[PoolId, Pool] = field(default_factory=dict[PoolId, Pool])
    tokens: dict[TokenId, Token] = field(default_factory=dict[TokenId, Token])
    parties: dict[PartyId, Party] = field(default_factory=dict[PartyId, Party])
    parties_by_key: dict[KeyFingerprint, PartyId] = field(default_factory=dict[KeyFingerprint, PartyId])
    workers: dict[PartyId, Worker] = field(default_factory=dict[PartyId, Worker])
    sessions: dict[SessionId, PartyId] = field(default_factory=dict[SessionId, PartyId])
    """Open sessions, and no other."""
    bundles: dict[Digest, Bundle] = field(default_factory=dict[Digest, Bundle])
    jobs: dict[JobId, Job] = field(default_factory=dict[JobId, Job])
    finished: dict[JobId, int] = field(default_factory=dict[JobId, int])
    """Finished jobs that are still here, by the sequence of their end, rising."""
    archived_through: int = 0
    """The latest end of a job that has left the state, as a sequence: views behind it do not know all references."""
    tasks: dict[TaskId, Task] = field(default_factory=dict[TaskId, Task])
    leases: dict[LeaseId, Lease] = field(default_factory=dict[LeaseId, Lease])
    ended_leases: dict[LeaseId, EndedLease] = field(default_factory=dict[LeaseId, EndedLease])
    ended_order: deque[LeaseId] = field(default_factory=deque[LeaseId])
    """The same leases, oldest first."""
    idempotency: dict[tuple[AccountId, bytes], IdempotencyRecord] = field(
        default_factory=dict[tuple[AccountId, bytes], IdempotencyRecord]
    )
    idempotency_order: deque[tuple[AccountId, bytes]] = field(default_factory=deque[tuple[AccountId, bytes]])
    """The same keys, oldest first."""
    deadlines: list[tuple[int, LeaseId]] = field(default_factory=list[tuple[int, LeaseId]])
    """(deadline, lease) of every live lease, sorted."""
    graces: list[tuple[int, PartyId]] = field(default_factory=list[tuple[int, PartyId]])
    """(grace_until_ms, worker) of every worker away that holds leases, sorted."""
    groups: dict[GroupKey, WorkerGroup] = field(default_factory=dict[GroupKey, WorkerGroup])
    lanes: dict[LaneKey, Lane] = field(default_factory=dict[LaneKey, Lane])
    tasks_created: int = 0
