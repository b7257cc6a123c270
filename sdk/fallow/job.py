"""A job as everybody sees it: states, options, progress, results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from fallow.bundle import Precision
from fallow.credits import PoolMode
from fallow.ids import Digest, JobId
from fallow.limits import FAILED_ROWS_MAX_DEFAULT
from fallow.session import BlobReference, Cause, NodeRows


class JobState(StrEnum):
    """States of a job; settlement follows the last."""

    PENDING = "pending"
    QUEUED = "queued"
    RUNNING = "running"
    VERIFYING = "verifying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"


JOB_STATES_FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})

JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.PENDING: frozenset({JobState.QUEUED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}),
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}),
    JobState.RUNNING: frozenset(
        {JobState.VERIFYING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}
    ),
    JobState.VERIFYING: frozenset(
        {JobState.RUNNING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.PAUSED}
    ),
    JobState.PAUSED: frozenset(
        {JobState.QUEUED, JobState.RUNNING, JobState.VERIFYING, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}
"""Every move that is allowed, and no other."""


PROVISIONAL = "provisional"
"""Status of a result whose rows wait for checks."""
VERIFIED = "verified"
TRUSTED = "trusted"
"""Status of a result of the submitter's own worker, or of an operator's."""
ACCEPTED = "accepted"
"""Status of a result that the job's owner took as it was."""


class Objective(StrEnum):
    """What the submitter optimises for."""

    COST = "cost"
    SPEED = "speed"
    CARBON = "carbon"


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What the submitter asks for beyond the work itself."""

    failed_rows_max: int = FAILED_ROWS_MAX_DEFAULT
    precision: Precision | None = None
    latency_ms_max: int = 0
    priority: int = 0
    deadline_ms: int = 0
    limit_microcredits_per_unit: int = 0
    """0: any price that the budget pays; without a budget, only work that costs nothing."""
    budget_microcredits: int = 0
    objective: Objective = Objective.COST
    region: str = ""
    device_kind: str = ""
    memory_bytes_min: int = 0
    assurance: str = ""
    retention_ms: int = 0
    """How long results, dataset and kept columns outlive the end of the job; 0: the coordinator's 30 days."""
    all_rows_may_fail: bool = False
    """True: a job none of whose rows has a value counts as done, if `failed_rows_max` allows it."""


@dataclass(frozen=True, slots=True)
class DatasetBlock:
    """One block of a dataset, in job order."""

    blob: BlobReference
    rows: int
    inline: bool
    """True when its bytes travel with the submission."""


@dataclass(frozen=True, slots=True)
class RowSpan:
    """A run of job positions and where their rows lie in an output block."""

    job_position: int
    block_row: int
    rows: int


@dataclass(frozen=True, slots=True)
class JobRowFailure:
    """A row without a value, and why."""

    job_position: int
    cause: Cause
    reason: str


@dataclass(frozen=True, slots=True)
class Footprint:
    """Energy and what it emitted: of a task, or summed. What workers say of energy is bounded and not checked."""

    millijoules: int = 0
    """Beyond what machines spend at rest."""
    millijoules_measured: int = 0
    """The part that sensors counted; the rest was estimated by CPU time."""
    micrograms: int = 0
    """CO₂ equivalents, by the coordinator's carbon table for region and hour."""
    millijoules_unplaced: int = 0
    """The part of which nobody knows what it emitted."""

    def plus(self, other: Footprint) -> Footprint:
        """The sum."""
        return Footprint(
            self.millijoules + other.millijoules,
            self.millijoules_measured + other.millijoules_measured,
            self.micrograms + other.micrograms,
            self.millijoules_unplaced + other.millijoules_unplaced,
        )

    @property
    def share_measured(self) -> float:
        """The part that sensors counted, from 0 to 1."""
        return self.millijoules_measured / self.millijoules if self.millijoules else 0.0

    def joules_per_1000_rows(self, rows: int) -> float:
        """Joules for each thousand of so many rows; 0 for none."""
        return self.millijoules / rows if rows else 0.0


@dataclass(frozen=True, slots=True)
class TaskResult:
    """Rows that are done; `cursor` counts the job's results from 1."""

    cursor: int
    spans: tuple[RowSpan, ...]
    output: BlobReference | None
    """None for rows that nobody could compute: all of them are failures."""
    failures: tuple[JobRowFailure, ...]
    worker_id: str
    node: int
    output_root: Digest | None
    status: str = "unverified"
    corrects: int = 0
    footprint: Footprint = Footprint()
    nodes: tuple[NodeRows, ...] = ()
    """Runs of the block's rows in order, by the node that did them; empty: `node` did them all."""

    def rows_by_node(self, span: RowSpan) -> Iterator[tuple[int, int]]:
        """(node, rows) of a part of the block."""
        if not self.nodes:
            yield self.node, span.rows
            return
        start = 0
        for run in self.nodes:
            inside = min(start + run.rows, span.block_row + span.rows) - max(start, span.block_row)
            if inside > 0:
                yield run.node, inside
            start += run.rows


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """Rows of a job that one node of one worker did."""

    worker_id: str
    node: int
    rows: int


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is."""

    rows_total: int = 0
    rows_done: int = 0
    """Rows with a result, failed ones among them."""
    rows_failed: int = 0
    rows_leased: int = 0
    tasks_settled: int = 0
    workers: int = 0


@dataclass(frozen=True, slots=True)
class RowChecks:
    """How the rows of a job with an assurance stand, counted."""

    rows_drawn: int = 0
    """Chosen to be checked."""
    rows_passed: int = 0
    """Of these: checked, and they stand."""
    rows_by_referee: int = 0
    """Of those: upheld by a referee, whom colluders cannot buy."""
    rows_tied: int = 0
    """Nobody could tell: they stand, and teach nothing."""
    rows_wrong: int = 0
    """Proven wrong."""
    rows_withdrawn: int = 0
    """Delivered, taken back and done again."""
    rows_trusted: int = 0
    """Done by the submitter's own or an operator's worker: not checked."""
    accepted: bool = False
    """The job's owner took it with the checks that were made by then."""

    @property
    def rows_open(self) -> int:
        """Drawn rows that are not decided, as far as counts tell: those of withdrawn results count too."""
        return max(0, self.rows_drawn - self.rows_passed - self.rows_tied - self.rows_wrong)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as its owner sees it."""

    job_id: JobId
    account_id: str
    pool_id: str
    state: JobState
    reason: str
    reason_code: str
    bundle_digest: Digest
    title: str
    data_class: str
    policy: str
    price_microcredits: int
    submitted_at_ms: int
    finished_at_ms: int
    """0 while unfinished."""
    output_schema: bytes
    kept: BlobReference | None
    results: int
    """0 once it is deleted."""
    progress: JobProgress = field(default_factory=JobProgress)
    pool_mode: PoolMode = PoolMode.DONATION
    """How it is paid; in a quota pool the amounts below are of the account's allotment."""
    budget_microcredits: int = 0
    """All that was set aside for it; 0: nothing, or in a quota pool no bound of its own."""
    spent_microcredits: int = 0
    reserved_microcredits: int = 0
    """What its live leases may cost."""
    warnings: tuple[str, ...] = ()
    """What its owner should know, for people."""
    deleted_at_ms: int = 0
    """When its results, dataset and kept columns were let go; 0: they are there."""
    footprint: Footprint = Footprint()
    deferred_until_ms: int = 0
    """It waits for cleaner electricity until then, or until the plan changes; 0: it does not."""
    checks: RowChecks | None = None
    """None: it has no assurance."""
    shares: tuple[WorkerShare, ...] = ()
    """Who delivered its rows, the most first: told when one job is asked for, not in lists and streams."""
