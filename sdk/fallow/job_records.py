"""What the journal's records say about one job, as plain facts: the parts that a certificate of results is made of."""

from __future__ import annotations

from dataclasses import dataclass

from fallow.ids import Digest


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record as the journal has it."""

    sequence: int
    at_ms: int
    epoch: int
    salt: bytes
    event: bytes
    """Deterministic bytes of a `fallow.journal.v1.Event`."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that a coordinator tells about a finished job."""

    records: tuple[RawRecord, ...]
    """Rising."""
    proof: tuple[bytes, ...]
    """That all of them stand under the checkpoint (`fallow.journal_proof`)."""
    statement: bytes
    """Exact bytes of an EvidenceStatement."""
    signature: bytes
    coordinator_certificate: bytes
    """DER."""
    authority_certificate: bytes
    """DER."""


@dataclass(frozen=True, slots=True)
class EvidenceWorker:
    """A worker of the job."""

    worker_id: str
    public_key: bytes
    tier: str
    owner_tag: bytes
    """Equal for workers of one owner, in this job."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What the coordinator signed beside the checkpoint."""

    job_id: str
    checkpoint: str
    records: int
    sequences_digest: bytes
    workers: tuple[EvidenceWorker, ...]
    sessions: dict[int, str]
    """Of commitments that were signed in another session than their lease was granted in, by record."""


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """A block of the dataset."""

    digest: Digest
    length_bytes: int
    rows: int


@dataclass(frozen=True, slots=True)
class Submitted:
    """The job was accepted."""

    job_id: str
    pool_id: str
    bundle_digest: Digest
    blocks: tuple[DatasetPart, ...]
    rows: int
    data_class: str
    title: str
    policy: str
    assurance: str
    budget_microcredits: int


@dataclass(frozen=True, slots=True)
class Moved:
    """The job changed its state."""

    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Funded:
    """Its owner added to its budget."""

    microcredits: int


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row of a settled lease's block."""

    lease_id: str
    row: int


@dataclass(frozen=True, slots=True)
class TaskMade:
    """Rows of the job were cut into a task: to be done, or to be checked."""

    task_id: str
    kind: str
    spans: tuple[tuple[int, int], ...]
    """Half-open ranges of job positions, in the order of its rows."""
    checks: tuple[CheckedRow, ...]
    """Of a task that audits, or that a referee has: the rows it checks, one for each of its own."""
    corrects: int
    """The result whose rows are done again; 0: none."""


@dataclass(frozen=True, slots=True)
class Granted:
    """A worker may work on a task."""

    lease_id: str
    task_id: str
    worker_id: str
    session_id: str
    fence: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A worker is bound to output rows."""

    lease_id: str
    output_root: Digest
    rows: int
    rows_failed: int
    output_digest: Digest
    output_length_bytes: int
    inline: bool
    execution_class: str
    message_digest: Digest
    signature: bytes
    message_sequence: int


@dataclass(frozen=True, slots=True)
class Settled:
    """A lease's rows count. Cursor 0: nothing is delivered by it; it audited, or came second with the same rows."""

    task_id: str
    lease_id: str
    cursor: int
    rows: int
    rows_failed: int
    microcredits: int
    released: bool
    contribution_microcredits: int


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Nobody could do a task's rows."""

    task_id: str
    cursor: int
    rows: int
    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class SecretSet:
    """The key of all draws of the job, fixed before its first commitment."""

    secret: bytes


@dataclass(frozen=True, slots=True)
class Drawn:
    """These rows of a lease are checked; a later one for the same lease adds rows."""

    lease_id: str
    worker_id: str
    cursor: int
    rows: int
    rate_ppm: int
    drawn: tuple[int, ...]
    refereed: tuple[int, ...]
    """Those of `drawn` that go straight to a referee."""
    trust: str
    """Why nothing is drawn: `own`, `operator`; else `none`."""


@dataclass(frozen=True, slots=True)
class Compared:
    """An audit's rows were compared with those that they check."""

    task_id: str
    lease_id: str
    worker_id: str
    equal: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Nobody could audit some rows: a referee checks them."""

    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    """What a referee found when it worked the rows out itself."""

    task_id: str
    lease_id: str
    worker_id: str
    own_root: Digest
    execution_class: str
    findings: tuple[tuple[str, ...], ...]
    """For each row of its task, what it found of each candidate; empty: there was no such candidate."""
    message_digest: Digest
    signature: bytes
    message_sequence: int


@dataclass(frozen=True, slots=True)
class Judged:
    """What is held of one row."""

    lease_id: str
    row: int
    worker_id: str
    verdict: str
    referee_lease_id: str


@dataclass(frozen=True, slots=True)
class Corrected:
    """Delivered rows are withdrawn, and done again."""

    lease_id: str
    cursor: int
    spans: tuple[tuple[int, int], ...]
    rows_failed: int
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class Released:
    """A lease's pay may be spent."""

    lease_id: str
    worker_id: str
    microcredits: int
    accepted: bool
    """Not by checks: the job's owner took the rows as they were."""


@dataclass(frozen=True, slots=True)
class Voided:
    """What a worker had earned in the job and not got yet returned to the job."""

    worker_id: str
    microcredits: int


@dataclass(frozen=True, slots=True)
class Distrusted:
    """A row of the worker was proven wrong."""

    worker_id: str
    lease_id: str
    row: int
    reason: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job's owner took its rows with the checks that were made by then."""


Fact = (
    Submitted
    | Moved
    | Funded
    | TaskMade
    | Granted
    | Committed
    | Settled
    | Abandoned
    | SecretSet
    | Drawn
    | Compared
    | GivenUp
    | Reported
    | Judged
    | Corrected
    | Released
    | Voided
    | Distrusted
    | Accepted
)
