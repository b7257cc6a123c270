"""What is kept of a verifying job's settled leases until their rows are verified. Changed by `evolve` alone."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import accumulate

from fallow.ids import Digest, JobId, LeaseId, PartyId, TaskId
from fallow.session import BlobReference
from fallow_coordinator.core.verification_events import EvidenceRow

Spans = tuple[tuple[int, int], ...]
"""Half-open ranges of job positions, in the order of a block's rows."""


class Stand(StrEnum):
    """How a drawn row stands."""

    AUDIT_DUE = "audit-due"
    AUDITED = "audited"
    """A task that audits it is under way, or waits to be compared."""
    REFEREE_DUE = "referee-due"
    REFEREED = "refereed"
    """A referee's task with it is under way."""
    PASSED = "passed"
    TIED = "tied"
    """It stands, and teaches nothing."""
    WITHDRAWN = "withdrawn"
    """It is done again."""


OPEN_STANDS = frozenset({Stand.AUDIT_DUE, Stand.AUDITED, Stand.REFEREE_DUE, Stand.REFEREED})


@dataclass(slots=True)
class CheckedRow:
    """A row that was drawn."""

    stand: Stand
    task_id: TaskId | None = None
    """The task that checks it now."""
    differing: EvidenceRow | None = None
    """A row of an audit that is not equal to it."""
    ties: int = 0
    by_referee: bool = False
    """A referee upheld it: what counts against colluders."""


@dataclass(slots=True)
class Evidence:
    """A settled lease whose rows are not verified yet."""

    lease_id: LeaseId
    worker_id: PartyId
    cursor: int
    spans: Spans
    rows: int
    output: BlobReference
    inline: bool
    commitment: Digest
    """Of the message that committed to the rows: what the draw is made from."""
    execution_class: str
    microcredits: int
    """Its pay, as long as that is pending."""
    failed_rows: frozenset[int]
    """Listed rows without a value."""
    rows_failed: int
    """All of them."""
    settled_at_ms: int
    further_rows: int
    """It is released once so many rows of the worker's later evidences stand, and all of its own that were drawn."""
    checked: dict[int, CheckedRow] = field(default_factory=dict[int, CheckedRow])
    open_rows: int = 0
    """Those of them that are not decided."""
    passed: int = 0

    def position_of(self, row: int) -> int:
        """The job position of a row of the block."""
        return position_in(self.spans, row)


@dataclass(slots=True)
class Audit:
    """A task that audits, from its making until none of its rows is in dispute."""

    task_id: TaskId
    checks: tuple[EvidenceRow, ...]
    audited: dict[PartyId, None]
    """Whose rows they are."""
    lease_id: LeaseId | None = None
    """The lease that settled it, as are the next ones."""
    worker_id: PartyId | None = None
    output: BlobReference | None = None
    inline: bool = False
    execution_class: str = ""
    microcredits: int = 0
    """The auditor's pay, as long as that is pending."""
    compared: bool = False
    disputed: dict[int, None] = field(default_factory=dict[int, None])
    """Its rows that a referee has to decide about."""


@dataclass(frozen=True, slots=True)
class Disputed:
    """A row of a referee's task, as it was when the task was made."""

    checks: EvidenceRow
    differing: EvidenceRow | None


@dataclass(slots=True)
class Share:
    """What one worker has in a job that is not released."""

    leases: dict[LeaseId, None] = field(default_factory=dict[LeaseId, None])
    """In the order in which they settled."""
    passed: int = 0
    """Rows of them that stand."""


@dataclass(slots=True)
class Verification:
    """What is verified of one unfinished job."""

    job_id: JobId
    secret: bytes
    evidences: dict[LeaseId, Evidence] = field(default_factory=dict[LeaseId, Evidence])
    """In the order in which they settled; what is released or withdrawn goes."""
    shares: dict[PartyId, Share] = field(default_factory=dict[PartyId, Share])
    """The same, by whose they are."""
    releasable: dict[LeaseId, None] = field(default_factory=dict[LeaseId, None])
    """Those of them that can be released."""
    audit_due: dict[PartyId, dict[EvidenceRow, None]] = field(default_factory=dict[PartyId, dict[EvidenceRow, None]])
    """Rows that wait for an audit, by whose they are."""
    referee_due: dict[EvidenceRow, None] = field(default_factory=dict[EvidenceRow, None])
    audits: dict[TaskId, Audit] = field(default_factory=dict[TaskId, Audit])
    audit_of: dict[LeaseId, TaskId] = field(default_factory=dict[LeaseId, TaskId])
    """Audits by the lease that settled them."""
    audits_done: dict[TaskId, None] = field(default_factory=dict[TaskId, None])
    """Compared audits of which no row is in dispute."""
    refereed: dict[TaskId, tuple[Disputed, ...]] = field(default_factory=dict[TaskId, tuple[Disputed, ...]])
    """Referees' tasks that are under way."""
    redo: dict[int, tuple[int, int]] = field(default_factory=dict[int, tuple[int, int]])
    """Withdrawn rows that are not in a task yet: first position → (end, the result that they correct)."""
    redone: dict[int, int] = field(default_factory=dict[int, int])
    """How often a position was done again without anybody's guilt."""
    strangers: dict[PartyId, str] = field(default_factory=dict[PartyId, str])
    """Workers whose rows lie further from a referee's than rounding explains, with their class: they get no more."""
    open_rows: int = 0
    """Drawn rows of all evidences that are not decided."""

    def wait_for_audit(self, worker_id: PartyId, row: EvidenceRow) -> None:
        """The row waits for an audit."""
        self.audit_due.setdefault(worker_id, {})[row] = None

    def wait_no_more(self, worker_id: PartyId, row: EvidenceRow) -> None:
        """The row waits neither for an audit nor for a referee, whichever it did."""
        due = self.audit_due.get(worker_id)
        if due is not None:
            due.pop(row, None)
            if not due:
                del self.audit_due[worker_id]
        self.referee_due.pop(row, None)

    def checked_by(self, row: EvidenceRow, task_id: TaskId) -> CheckedRow | None:
        """How a row stands that this task checks; None when nobody needs that any more."""
        evidence = self.evidences.get(row.lease_id)
        checked = evidence.checked.get(row.row) if evidence is not None else None
        return checked if checked is not None and checked.task_id == task_id else None


def position_in(spans: Spans, row: int) -> int:
    """The job position of a row of a block with these spans."""
    if len(spans) == 1:
        return spans[0][0] + row
    ends = list(accumulate(end - start for start, end in spans))
    index = bisect_right(ends, row)
    return spans[index][1] - (ends[index] - row)
