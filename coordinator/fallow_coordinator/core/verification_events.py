"""What did happen while results were verified: draws, comparisons, verdicts and what follows from them.

As in `events`: integers only in what `evolve` reads, and a shipped shape is for ever. Only jobs with an assurance have
any of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from fallow.comparison import RowFinding
from fallow.ids import AccountId, Digest, JobId, LeaseId, PartyId, TaskId


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """A row of a settled lease's block: the position in the block, from 0."""

    lease_id: LeaseId
    row: int


class Trust(StrEnum):
    """Why a lease's rows need no audit; NONE: they do."""

    NONE = "none"
    OWN = "own"
    """The submitter's own worker did them."""
    OPERATOR = "operator"
    """An operator's worker did them."""


class Verdict(StrEnum):
    """What a referee's findings mean for one row of one worker."""

    UPHELD = "upheld"
    PROVEN_WRONG = "proven-wrong"
    """The only one that costs anybody anything, with the next."""
    AUDITOR_WRONG = "auditor-wrong"
    """The row that an audit gave is wrong."""
    TIE = "tie"
    """Nobody can tell; the row stands, and teaches nothing of who did it."""
    UNEXPLAINED = "unexplained"
    """Further from a referee's than rounding explains, in a class of which nothing is known: no guilt, and nothing
    that the worker did in the job and that was not checked itself stands."""
    DONE_AGAIN = "done-again"
    """No guilt, and not to be upheld: the row is done again."""


@dataclass(frozen=True, slots=True)
class DrawSecretSet:
    """The key by which rows of this job are drawn for audits, fixed before any commitment of the job."""

    job_id: JobId
    secret: bytes
    """32 bytes; shown in the job's certificate once the job has ended."""


@dataclass(frozen=True, slots=True)
class AuditsDrawn:
    """A lease of a verifying job settled: these rows of it are checked. Another one for the same lease adds rows."""

    lease_id: LeaseId
    job_id: JobId
    worker_id: PartyId
    cursor: int
    """The job's result that the lease settled."""
    rows: int
    """Of the lease's block."""
    execution_class: str
    """As committed."""
    rate_ppm: int
    drawn: tuple[int, ...]
    """Rows of the block, rising; in a later event those that are new."""
    refereed: tuple[int, ...] = ()
    """Those of `drawn` that go straight to a referee."""
    trust: Trust = Trust.NONE
    """Why nothing is drawn."""
    microcredits: int = 0
    """The lease's pay, where it waits for the checks."""
    further_rows: int = 0
    """It is released once so many checked rows of the worker's later leases of the job stand, and all that were drawn
    of its own."""


@dataclass(frozen=True, slots=True)
class AuditCompared:
    """An audit's rows were compared with those that they check, byte by byte."""

    task_id: TaskId
    lease_id: LeaseId
    """The audit's own."""
    job_id: JobId
    worker_id: PartyId
    """The auditor."""
    equal: tuple[bool, ...]
    """One for each row of the task, in order: both are the same bytes, or both have no value."""


@dataclass(frozen=True, slots=True)
class AuditGivenUp:
    """Nobody can audit these rows: a referee checks them."""

    job_id: JobId
    rows: tuple[EvidenceRow, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class RefereeReported:
    """Evidence: what an operator's worker found when it worked the rows out itself, and the signature over that."""

    task_id: TaskId
    lease_id: LeaseId
    job_id: JobId
    worker_id: PartyId
    own_root: Digest
    """Merkle root over its own output rows, in the order of the task's rows."""
    execution_class: str
    findings: tuple[RowFinding, ...]
    message_digest: Digest
    signature: bytes
    sequence: int


@dataclass(frozen=True, slots=True)
class VerdictReached:
    """What is held of one row from here on."""

    job_id: JobId
    lease_id: LeaseId
    """Whose row it is: the lease that settled it, or for AUDITOR_WRONG the audit's lease."""
    row: int
    worker_id: PartyId
    """Whose lease that was."""
    verdict: Verdict
    referee_lease_id: LeaseId


@dataclass(frozen=True, slots=True)
class RowsCorrected:
    """Rows that were delivered before are withdrawn and done again; later results give them anew."""

    job_id: JobId
    lease_id: LeaseId
    """Whose rows they were."""
    cursor: int
    """The result that gave them."""
    spans: tuple[tuple[int, int], ...]
    """Half-open ranges of job positions, rising."""
    rows_failed: int
    """So many of them had no value."""
    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class EvidenceReleased:
    """Enough of a lease's rows, and of those after it, were checked: its pay may be spent."""

    lease_id: LeaseId
    job_id: JobId
    worker_id: PartyId
    account_id: AccountId
    """The worker's."""
    microcredits: int
    accepted: bool = False
    """True: not by audits, the job's owner took it as it was."""


@dataclass(frozen=True, slots=True)
class PayVoided:
    """What a worker had earned in a job and not got yet returns to the job."""

    job_id: JobId
    worker_id: PartyId
    account_id: AccountId
    """The worker's."""
    microcredits: int


@dataclass(frozen=True, slots=True)
class WorkerDistrusted:
    """A row of the worker is proven wrong: its record is zero, and it gets no work of verifying jobs."""

    worker_id: PartyId
    job_id: JobId
    lease_id: LeaseId
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerTrusted:
    """An operator lets the worker begin anew, with an empty record."""

    worker_id: PartyId


@dataclass(frozen=True, slots=True)
class AssuranceAccepted:
    """The job's owner takes its rows with the checks that were made by now."""

    job_id: JobId


VerificationEvent = (
    DrawSecretSet
    | AuditsDrawn
    | AuditCompared
    | AuditGivenUp
    | RefereeReported
    | VerdictReached
    | RowsCorrected
    | EvidenceReleased
    | PayVoided
    | WorkerDistrusted
    | WorkerTrusted
    | AssuranceAccepted
)
