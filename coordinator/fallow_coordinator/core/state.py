"""Everything the coordinator knows, changed by `evolve` alone. What is finished and in the views leaves."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum

from fallow.bundle import InspectionReport
from fallow.challenge import ChallengePlan
from fallow.credits import PoolMode
from fallow.ids import AccountId, Digest, JobId, KeyFingerprint, LeaseId, PartyId, PoolId, SessionId, TaskId, TokenId
from fallow.job import DatasetBlock, Footprint, JobOptions, JobState, RowChecks, TaskResult
from fallow.ranges import RangeSet
from fallow.roles import DataClass, Role, Tier
from fallow.session import BlobReference, Capability, Cause, NodeRows, RowFailure, TaskKind
from fallow_coordinator.core.carbon import Forecast
from fallow_coordinator.core.commands import StoredBlob
from fallow_coordinator.core.events import LeaseOutcome, PackedCandidate
from fallow_coordinator.core.evidence import Verification
from fallow_coordinator.core.ledger import Ledger
from fallow_coordinator.core.limits import STAYS_BUCKETS
from fallow_coordinator.core.needs import INSPECTION, Ability, Needs
from fallow_coordinator.core.verification_events import EvidenceRow

LaneKey = Needs
"""Tasks with the same needs stand in one lane."""
NO_GROUP = -1
NO_DIGEST = Digest(b"")


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
    footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
    """Of its jobs' settled tasks."""
    inspected_last: int = 0
    """Journal sequence at which a bundle of its own was last leased for inspection; 0: never."""
    share_key: int = 0
    """Its place in the fair order: who has the lowest is served next (`shares`); 0: never served."""
    lanes: dict[Needs, None] = field(default_factory=dict[Needs, None])
    """Lanes where it has rows to cut."""
    ready: list[tuple[int, int, TaskId]] = field(default_factory=list[tuple[int, int, TaskId]])
    """Its tasks that stand ready in some lane, in the order of their lanes."""
    stock: int = 0
    """Its tasks being packed or ready."""
    own_workers: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    """Its own workers that are counted in a group, operators' machines excepted: they serve everybody alike."""
    own_free: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    """Those of them with free window."""
    own_ahead: int = 0
    """Tasks worth keeping packed for its own workers."""
    microcredits_unverified: int = 0
    """The part of what is pending that waits for checks."""


@dataclass(slots=True)
class Pool:
    """Workers under one mode and one rule of trust."""

    pool_id: PoolId
    account_id: AccountId
    name: str
    mode: PoolMode
    policy: str
    closed: bool = False
    """True: only admitted accounts, its own and the operator's submit there."""
    admitted: dict[AccountId, None] = field(default_factory=dict[AccountId, None])


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


@dataclass(frozen=True, slots=True)
class DeviceCertificate:
    """What challenges have shown of a device; it ends with the device's identity, or when it expires."""

    device_id: str
    device_digest: Digest
    """The identity that was measured: `devices.identity_of`."""
    units_milli_per_s: int = 0
    """Speed in float32: thousandths of a unit a second; 0: not measured yet."""
    speed_challenge: TaskId | None = None
    speed_measured_at_ms: int = 0
    speed_again_at_ms: int = 0
    """Drawn when it was measured: from then on it may be measured again."""
    speed_expires_at_ms: int = 0
    memory_bytes: int = 0
    """How much was filled and walked; 0: not measured yet."""
    memory_challenge: TaskId | None = None
    memory_measured_at_ms: int = 0
    memory_again_at_ms: int = 0
    memory_expires_at_ms: int = 0

    @property
    def expires_at_ms(self) -> int:
        """When the first of what it says is too old."""
        moments = (self.speed_expires_at_ms, self.memory_expires_at_ms)
        return min(moment for moment in moments if moment)

    @property
    def complete(self) -> bool:
        """Whether both speed and memory have been shown."""
        return bool(self.units_milli_per_s and self.memory_bytes)


@dataclass(frozen=True, slots=True)
class ChallengeRecord:
    """How the newest challenges of a device went."""

    failures: int
    """In a row, whoever was to blame."""
    retry_at_ms: int
    reason: str
    blamed: bool


@dataclass(slots=True)
class Challenge:
    """A challenge from its issue to its verdict. Its task lives as long as its lease."""

    task_id: TaskId
    worker_id: PartyId
    device_digest: Digest
    plan: ChallengePlan
    issued_at_ms: int
    answered: bool = False
    """Committed to in time: `units_milli_per_s` counts once the answer is checked."""
    units_milli_per_s: int = 0
    output: BlobReference | None = None
    """The answer, once it is delivered."""
    output_inline: bool = False
    check_task_id: TaskId | None = None
    """The live check of it."""
    checks: int = 0
    """Checks that came to nothing."""


@dataclass(slots=True)
class Stays:
    """When a worker was there, counted by `availability`."""

    first_at_ms: int = 0
    """Since when it is known; 0: it never came."""
    since_ms: int = 0
    """When its present or latest stay began."""
    opened_at_ms: int = 0
    left_at_ms: int = 0
    cut_off: bool = False
    """Its latest session was closed by a restart of ours."""
    minutes: dict[int, int] = field(default_factory=dict[int, int])
    """Minutes in which it was connected, by hour of the week (UTC, from Thursday, as 1970 began)."""
    ends: list[int] = field(default_factory=lambda: [0] * STAYS_BUCKETS)
    """Stays that ended, by doublings of a minute."""
    at_risk: list[int] = field(default_factory=lambda: [0] * STAYS_BUCKETS)
    """Stays that lasted into each."""


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
    machine_digest: bytes = b""
    """Of the machine that opened its last session; empty: not told."""
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
    footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
    """Of the tasks it settled."""
    rows_settled: int = 0
    tasks_settled: int = 0
    rows_verified: int = 0
    """Its record of correctness: rows that were checked and stand, since it was last proven wrong."""
    rows_unverified: int = 0
    """Rows of its settled leases that are not verified yet: what it would lose by a lie."""
    record_class: str = ""
    """The execution class of its newest evidence; another one halves the record."""
    distrusted_reason: str = ""
    """Why it gets no work of verifying jobs; empty: it does."""
    free_since_ms: int = 0
    """Since when it has held no lease in its open session; 0 while it holds one, or never had a session."""
    certificates: dict[str, DeviceCertificate] = field(default_factory=dict[str, DeviceCertificate])
    """Of its devices that were measured, by device."""
    challenged: dict[str, ChallengeRecord] = field(default_factory=dict[str, ChallengeRecord])
    """Devices whose last challenge came to nothing."""
    speed_milliunits_per_s: int = 0
    """One slot's speed on accepted work, lately; 0: not known."""
    speeds: dict[Digest, int] = field(default_factory=dict[Digest, int])
    """The same for each bundle, the latest last."""
    settled_at_ms: int = 0
    """When its latest task was accepted."""
    stays: Stays = field(default_factory=Stays)
    strikes: int = 0
    """Failures of its own that no success has made good (`health`)."""
    cooling_until_ms: int = 0
    """It rests until a tick after this moment; 0: it does not rest."""
    window_max: int = 0
    """Leases that it may hold while it proves itself again; 0: as many as it likes."""
    bundles: dict[Digest, bool] = field(default_factory=dict[Digest, bool])
    """Bundles that it is thought to have, the latest last; true: loaded."""
    group: int = NO_GROUP
    """Number of the group where it is counted now; none while it is away or quarantined."""
    ask_microcredits_per_unit: int = 0
    """What it asks now; 0 in a pool without prices."""

    @property
    def room(self) -> int:
        """Leases it may hold at once now."""
        if self.cooling_until_ms:
            return 0
        return min(self.window, self.window_max) if self.window_max else self.window

    @property
    def free(self) -> int:
        """Leases it may be given now."""
        return max(0, self.room - len(self.leases)) if self.group != NO_GROUP else 0

    @property
    def load(self) -> int:
        """Leases held for each thousand slots."""
        return len(self.leases) * 1_000 // self.slots


@dataclass(slots=True)
class WorkerGroup:
    """Connected workers of one ability. Lives while it has members or tasks are kept in stock for it."""

    number: int
    ability: Ability
    members: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    cheapest: list[tuple[int, int, PartyId]] = field(default_factory=list[tuple[int, int, PartyId]])
    """(ask, load, worker) of those with free window, sorted."""
    fastest: list[tuple[int, int, PartyId]] = field(default_factory=list[tuple[int, int, PartyId]])
    """(time until it would have done one unit more, ask, worker) of the same, sorted."""
    asks: list[int] = field(default_factory=list[int])
    """What its members that take work ask for a unit, sorted."""
    free_total: int = 0
    """Sum of free windows."""
    ahead_total: int = 0
    """Tasks worth keeping packed ahead: one for each slot that takes work."""
    window_total: int = 0
    """Sum of windows, free or not."""
    packing: int = 0
    """Tasks being packed for it."""
    stock: int = 0
    """The same, and those that stand ready."""


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
    """Accounts whose workers say that it crashed them, since it was last cleared."""
    clearances: int = 0
    """Inspections that found it well after such claims."""
    jobs: dict[JobId, None] = field(default_factory=dict[JobId, None])
    """Unfinished jobs that use it."""
    cost_permille: int = 1_000
    """What accepted work has taught of its cost, in thousandths of what inspection found; for jobs to come."""
    learning_tasks: int = 0
    """Tasks on measured devices since then."""
    learning_inspected: int = 0
    """Their work in micro-units as inspection had estimated it."""
    learning_worked: int = 0
    """The same as it turned out."""
    holders: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    """Workers that are thought to have it, the latest last."""


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
    block_size_sums: tuple[tuple[int, ...], ...]
    """Sums of the size features of each block; empty where there are none, and for jobs from before their recording."""
    rows: int
    data_class: DataClass
    title: str
    options: JobOptions
    kept: BlobReference | None
    policy: str
    price_microcredits: int
    submitted_at_ms: int
    mode: PoolMode = PoolMode.DONATION
    """Its pool's when it was submitted: how it is paid until it ends."""
    budget_microcredits: int = 0
    """All that was ever set aside for it; 0 in a quota pool: no bound of its own."""
    reserved_microcredits: int = 0
    """Sum of the reservations of its live leases."""
    state: JobState = JobState.PENDING
    reason: str = ""
    reason_code: str = ""
    finished_at_ms: int = 0
    cost_permille: int = 1_000
    """Its cost in thousandths of what inspection found, as it was known when the job was first ready."""
    unit_nano_starts: tuple[int, ...] = ()
    """Cost of all blocks before each, and of all at the end, by the bundle's cost curve; empty until the job is ready,
    and where there is no curve."""
    next_row: int = 0
    tasks: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """Live tasks, and no other."""
    late: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """Tasks whose rows are delivered and of which one more lease is still out."""
    duplicates: int = 0
    """Second leases that were granted because a first one was late."""
    late_footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
    """The part of `footprint` of leases that delivered nothing, because another one had."""
    tasks_created: int = 0
    done: RangeSet = field(default_factory=RangeSet)
    rows_failed: int = 0
    rows_leased: int = 0
    tasks_settled: int = 0
    microcredits: int = 0
    """What it has paid."""
    results: list[TaskResult] = field(default_factory=list[TaskResult])
    """Result n has cursor n + 1; none are left once the job is deleted."""
    shares: dict[tuple[str, int], int] = field(default_factory=dict[tuple[str, int], int])
    """Rows in `results` by worker and node."""
    deleted_at_ms: int = 0
    """0: its results, dataset and kept columns are there."""
    deleted_reason: str = ""
    footprint: Footprint = Footprint()  # noqa: RUF009 - frozen
    """Of its settled tasks, those done twice counted twice."""
    deferred_until_ms: int = 0
    """It waits for clean electricity until then, or until the plan changes; 0: it does not."""
    parked: bool = False
    """Its waiting and ready tasks stand outside the lane; changed by `parking` alone."""
    number: int = 0
    """Journal sequence of its submission."""
    lane: Needs = INSPECTION
    """Where its tasks queue: what it asked for in the pool as it was then."""
    due_ms: int = 0
    """Its place among the jobs of its account, the earliest first; 0: first come, first served."""
    checks: RowChecks | None = None
    """How its rows stand; None: it has no assurance."""


class TaskPhase(StrEnum):
    """Where a live task is."""

    WAITING = "waiting"
    """For its next packing, from `not_before_ms` on."""
    PACKING = "packing"
    READY = "ready"
    LEASED = "leased"
    ANSWERED = "answered"
    """Its rows are delivered; another lease of it is still out."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The commitment that delivered a task's rows, for comparison with a late one."""

    lease_id: LeaseId
    output_root: Digest
    execution_class: str


@dataclass(slots=True)
class Task:
    """Live work. The fence counts its leases; the pack number counts its packings; both only grow.

    It has one live lease, or two of different workers when the first is late.
    """

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
    """Its live lease, the older one of two."""
    duplicate_id: LeaseId | None = None
    """Its second live lease; None unless there are two."""
    duplicates: int = 0
    """Second leases that it ever had."""
    answer: Answer | None = None
    """What delivered its rows, while it is `ANSWERED`."""
    attempts: int = 0
    """Failures that were somebody's fault."""
    losses: int = 0
    challenge_task_id: TaskId | None = None
    """Of a check: the challenge that it checks."""
    avoid: dict[PartyId, None] = field(default_factory=dict[PartyId, None])
    """Workers on which it failed."""
    last_cause: Cause = Cause.PLATFORM
    last_reason: str = ""
    stamp: int = 0
    """Its account's share key when it was cut: its place among what stands ready."""
    stock_group: int = NO_GROUP
    """The group for which it is kept in stock while it is packed or ready."""
    checks: tuple[EvidenceRow, ...] = ()
    """Of an audit, and of a referee's task: the rows that it checks, one for each of its own."""
    corrects: int = 0
    """Of rows that are done again: the result that it corrects."""
    candidates: tuple[PackedCandidate, ...] = ()
    """Of a referee's task that is packed, as is the next one."""
    execution_classes: tuple[str, ...] = ()

    @property
    def lease_ids(self) -> tuple[LeaseId, ...]:
        """Its live leases, the older one first."""
        return tuple(lease_id for lease_id in (self.lease_id, self.duplicate_id) if lease_id is not None)

    def other_lease_id(self, lease_id: LeaseId) -> LeaseId | None:
        """Its live lease that is not this one."""
        return self.duplicate_id if self.lease_id == lease_id else self.lease_id


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
    wall_us: int = 0
    """What the worker says it took."""
    millijoules: int = 0
    energy_measured: bool = False
    message_digest: Digest = NO_DIGEST
    """Of verifying jobs: what the draw is made from."""
    nodes: tuple[NodeRows, ...] = ()
    """Runs of the rows by node; empty: `node` did them all."""
    execution_class: str = ""


@dataclass(slots=True)
class Lease:
    """A live lease. Its fence is its own; the newest lease of a task has the task's."""

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
    price_microcredits_per_unit: int = 0
    reserved_microcredits: int = 0


@dataclass(frozen=True, slots=True)
class EndedLease:
    """A lease that is over, remembered to answer latecomers."""

    task_id: TaskId
    job_id: JobId | None
    worker_id: PartyId
    fence: int
    outcome: LeaseOutcome | None
    """None: it settled, or was late."""
    commitment: CommitmentFacts | None
    input: Digest | None = None
    """Its input in the blob service, which nobody needs any more; None when it was inline, had none, or another lease
    still needs it."""
    candidates: tuple[Digest, ...] = ()
    """The same of a referee's candidates."""
    late: bool = False
    """True: another lease had delivered the rows when this one committed."""


@dataclass(frozen=True, slots=True)
class IdempotencyRecord:
    """Which job an account's key made."""

    request_digest: Digest
    job_id: JobId
    at_ms: int


@dataclass(slots=True)
class Lane:
    """Work that asks the same of workers."""

    groups: int = 0
    """The groups that fit, one bit each."""
    window_total: int = 0
    """Sum of their windows."""
    regions_closed: frozenset[str] = frozenset()
    """Regions whose electricity is too dirty for this work in this hour; their groups are left out above."""
    queue: list[tuple[int, AccountId]] = field(default_factory=list[tuple[int, AccountId]])
    """(share key, account) of those with uncut rows here, sorted: whose turn it is stands first."""
    accounts: dict[AccountId, list[tuple[int, int, JobId]]] = field(
        default_factory=dict[AccountId, list[tuple[int, int, JobId]]]
    )
    """(due, number, job) of each such account, sorted."""
    waiting: list[tuple[int, int, TaskId]] = field(default_factory=list[tuple[int, int, TaskId]])
    """(not before, number, task), sorted."""
    packing: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    ready: list[tuple[int, int, TaskId]] = field(default_factory=list[tuple[int, int, TaskId]])
    """(stamp, number, task), sorted."""
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
    restarted_at_ms: int = 0
    """When a writer came back last; 0: there was none before the first."""
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
    duplicated: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """Tasks that have two live leases, or are answered and have one left."""
    leases: dict[LeaseId, Lease] = field(default_factory=dict[LeaseId, Lease])
    """Live leases, the first granted first."""
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
    cooling: list[tuple[int, PartyId]] = field(default_factory=list[tuple[int, PartyId]])
    """(until, worker) of every worker that rests, sorted."""
    groups: dict[int, WorkerGroup] = field(default_factory=dict[int, WorkerGroup])
    """By number; sets of groups are integers with a bit for each number."""
    group_numbers: dict[Ability, int] = field(default_factory=dict[Ability, int])
    free_groups: int = 0
    """Groups with free window."""
    hungry_groups: int = 0
    """Groups whose free windows are more than what is being packed for them."""
    wanting_groups: int = 0
    """Groups for which less is packed or being packed than their windows and slots could take."""
    lanes: dict[LaneKey, Lane] = field(default_factory=dict[LaneKey, Lane])
    ledger: Ledger = field(default_factory=Ledger)
    challenges: dict[TaskId, Challenge] = field(default_factory=dict[TaskId, Challenge])
    """Challenges without a verdict, first issued first."""
    open_lanes: dict[LaneKey, None] = field(default_factory=dict[LaneKey, None])
    """Lanes with ready tasks."""
    own_ready: dict[AccountId, None] = field(default_factory=dict[AccountId, None])
    """Accounts with ready tasks and free workers of their own."""
    own_wanting: dict[AccountId, None] = field(default_factory=dict[AccountId, None])
    """Accounts with rows to cut and less in stock than their own workers could take."""
    tolerances: dict[tuple[Digest, str, str], dict[AccountId, tuple[int, ...]]] = field(
        default_factory=dict[tuple[Digest, str, str], dict[AccountId, tuple[int, ...]]]
    )
    """By bundle, class of the referee and class of the candidate, the latest learned last: the latest deviations that
    rows of each account showed, in millionths of the bundle's spread."""
    forecasts: dict[str, Forecast] = field(default_factory=dict[str, Forecast])
    """Grams of CO₂ per kWh to come, by region; `carbon.ELSEWHERE` for all others."""
    forecast_source: str = ""
    carbon_jobs: dict[JobId, None] = field(default_factory=dict[JobId, None])
    """Unfinished jobs whose objective is little carbon."""
    deferred: list[tuple[int, JobId]] = field(default_factory=list[tuple[int, JobId]])
    """(until, job) of every job that waits for clean electricity, sorted."""
    carbon_planned_at_ms: int = 0
    """When waiting for clean electricity was last planned."""
    verifications: dict[JobId, Verification] = field(default_factory=dict[JobId, Verification])
    """Of unfinished jobs with an assurance."""
    tasks_created: int = 0
