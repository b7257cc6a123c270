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
class TaskMade:
    """Rows of the job were cut into a task: to be done, or to be checked."""

    task_id: str
    kind: str
    spans: tuple[tuple[int, int], ...]
    """Half-open ranges of job positions, in the order of its rows."""


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
    """A lease's rows count."""

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


Fact = Submitted | Moved | Funded | TaskMade | Granted | Committed | Settled | Abandoned
