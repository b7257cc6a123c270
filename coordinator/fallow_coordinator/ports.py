"""What the engine needs from outside; each port has one contract suite that every implementation passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fallow.credits import StatementLine
from fallow.ids import AccountId, Digest, JobId, PartyId
from fallow.job import JobStatus, TaskResult, WorkerShare
from fallow.session import BlobReference
from fallow_coordinator.core.effects import Effect
from fallow_coordinator.core.events import Event, JobSubmitted
from fallow_coordinator.core.prices import PricePoint
from fallow_coordinator.core.state import State


@dataclass(frozen=True, slots=True)
class Record:
    """One event as the journal holds it."""

    sequence: int
    """From 1, without gaps."""
    at_ms: int
    """The journal's clock, milliseconds since 1970; never goes back."""
    event: Event
    leaf: bytes = field(default=b"", compare=False)
    """Its salted leaf in the journal's tree: another one in each copy of the same events."""


class RawRecord(Protocol):
    """A record as it lies on disk."""

    @property
    def sequence(self) -> int: ...

    @property
    def at_ms(self) -> int: ...

    @property
    def epoch(self) -> int: ...

    @property
    def event(self) -> bytes: ...

    @property
    def salt(self) -> bytes: ...


class Store(Protocol):
    """The journal and the inline payloads. Synchronous; `append` returns when everything is on disk."""

    @property
    def epoch(self) -> int:
        """This writer's epoch: opening a store for writing takes the next one, which fences every older writer."""
        ...

    @property
    def last_sequence(self) -> int:
        """Sequence of the newest record, 0 when empty."""
        ...

    @property
    def last_at_ms(self) -> int:
        """Clock of the newest record, 0 when empty."""
        ...

    def append(
        self,
        *,
        expected_sequence: int,
        events: Sequence[tuple[int, Event]],
        payloads: Mapping[Digest, bytes],
    ) -> None:
        """Makes `(at_ms, event)` pairs and payloads durable in one transaction.

        Raises `WriterFenced` when another writer opened the store or `expected_sequence` is not the last one, and
        `StorageFailed` when the disk refuses; after either, this process must end.
        """
        ...

    def read(self, *, after_sequence: int, limit: int) -> Sequence[Record]:
        """Up to `limit` records after a sequence, oldest first, decoded from bytes whose hashes were checked."""
        ...

    def payload(self, digest: Digest) -> bytes | None:
        """An inline payload, or None when it is not (any more) here."""
        ...

    def payload_digests(self, *, after: Digest, limit: int) -> Sequence[Digest]:
        """Up to `limit` digests of payloads behind `after`, rising; `Digest(b"")` begins."""
        ...

    def drop_payloads(self, digests: Sequence[Digest]) -> int:
        """Drops payloads that nothing live or retained refers to; gives how many were there."""
        ...

    def let_go_of_sealed(self, limit: int) -> int:
        """Takes up to `limit` records that lie in sealed segments out of the way of appending; gives how many.

        `read` still gives them. Raises as `append` does, and the process must end then.
        """
        ...

    def close(self) -> None: ...


class Snapshots(Protocol):
    """States that somebody folded from this journal before."""

    def newest(self) -> State | None:
        """The newest that can be used, at its own `sequence`; None: fold the journal from its beginning."""
        ...


class WriterFenced(Exception):
    """Another writer has taken over the journal."""


class StorageFailed(Exception):
    """The disk refused; the message says which file and what to do."""


class LedgerUnsound(StorageFailed):
    """The journal's books do not add up: nothing may be paid from them."""


class Views(Protocol):
    """What the follower made of the journal, for questions about what has left the state. Read-only, other thread."""

    def view_sequence(self) -> int: ...

    def job_status(self, job_id: JobId) -> JobStatus | None: ...

    def jobs(self, account_id: AccountId, *, before: tuple[int, str] | None, limit: int) -> Sequence[JobStatus]:
        """Newest first; `before` is (submitted_at_ms, job_id) of the last one seen."""
        ...

    def results(self, job_id: JobId, *, after_cursor: int, limit: int) -> Sequence[TaskResult]: ...

    def shares(self, job_id: JobId, *, limit: int) -> Sequence[WorkerShare]:
        """Rows by worker and node, the most first."""
        ...

    def output(self, account_id: AccountId, digest: Digest) -> BlobReference | None:
        """An output block of one of the account's jobs, or None: archived results stay readable by their owner."""
        ...

    def submission(self, job_id: JobId) -> JobSubmitted | None:
        """What a job that is not deleted was submitted as."""
        ...

    def references(self, digests: Sequence[Digest]) -> tuple[int, frozenset[Digest]]:
        """(view_sequence, those of the blobs and payloads to which a job refers that is not deleted), of one moment."""
        ...

    def expired_jobs(self, now_ms: int, limit: int) -> Sequence[tuple[AccountId, JobId]]:
        """Jobs whose retention is over and that are not deleted, the longest overdue first."""
        ...


@dataclass(frozen=True, slots=True)
class StatementPage:
    """Some rows of a statement, and what the books had before and after all of it."""

    rows: Sequence[StatementLine]
    opening: Mapping[str, int]
    closing: Mapping[str, int]
    sequence: int


@dataclass(frozen=True, slots=True)
class EarningsRow:
    """What a worker did on one day (UTC) in one pool."""

    day_ms: int
    pool_id: str
    tasks: int
    rows: int
    rows_failed: int
    unit_micros: int
    microcredits: int
    contribution_microcredits: int
    energy_millijoules: int


class LedgerViews(Protocol):
    """What the follower knows of credits, for statements. Read-only, other thread."""

    def statement(
        self, account_id: AccountId, *, since_ms: int, until_ms: int, offset: int, limit: int
    ) -> StatementPage:
        """Rows from `since_ms` to before `until_ms`, the oldest first."""
        ...

    def earnings(self, worker_id: PartyId, *, since_ms: int) -> tuple[int, Sequence[EarningsRow]]:
        """(view_sequence, days, the newest first)."""
        ...

    def prices(self, *, since_ms: int) -> Mapping[str, Sequence[PricePoint]]:
        """What was paid, by class of devices, each rising by price."""
        ...


class Prover(Protocol):
    """What the journal holds, with proof. Synchronous, one thread at a time; raises StorageFailed."""

    def size(self) -> int:
        """How many records the journal has now."""
        ...

    def root(self, size: int) -> Digest:
        """The root over the first `size` records."""
        ...

    def consistency(self, old_size: int, size: int) -> list[bytes]:
        """The proof that the first `old_size` records begin the first `size` (RFC 6962 §2.1.2)."""
        ...

    def inclusion(self, sequences: Sequence[int], size: int) -> list[bytes]:
        """The proof that these records (rising) are among the first `size` (`fallow.journal_proof`)."""
        ...

    def has_ended(self, job_id: JobId) -> bool:
        """Whether `job_records` knows of the job's end."""
        ...

    def job_records(self, job_id: JobId) -> tuple[int, Sequence[tuple[int, str]]]:
        """(sequence up to which this goes, (sequence, session of a commitment or "") of each record, rising)."""
        ...

    def records(self, sequences: Sequence[int]) -> Iterator[Sequence[RawRecord]]:
        """These records (rising), some at a time."""
        ...


class EffectSink(Protocol):
    """Acts on what has become durable, in order; must not block."""

    def apply(self, effects: Sequence[Effect]) -> None: ...


class Packer(Protocol):
    """Packs rows of stored blocks into a fresh block (the blob service's Pack call)."""

    async def pack(
        self, *, sources: Sequence[tuple[Digest, int]], spans: Sequence[tuple[int, int, int]], nonce: bytes
    ) -> tuple[Digest, int]:
        """`sources` are (digest, length_bytes); `spans` are (source, first_row, rows). Gives (digest, length_bytes)."""
        ...


@dataclass(frozen=True, slots=True)
class RowSource:
    """A row block of which single rows are packed or compared."""

    blob: BlobReference
    inline_block: bytes = b""
    """The block itself when it is a payload of the journal; empty: the blob service has it."""


RowPlace = tuple[int, int]
"""(index of a source, row of its block)."""


class SingleRows(Protocol):
    """Packs and compares single rows of stored blocks (the blob service's PackRows and CompareRows calls).

    Both raise BLOB_UNKNOWN, FIELD_INVALID for a row that is not in its block, ROW_BLOCK_MALFORMED, SCHEMA_MISMATCH,
    LIMIT_EXCEEDED, or COORDINATOR_UNREACHABLE when the service stays away.
    """

    async def pack_rows(
        self, *, sources: Sequence[RowSource], rows: Sequence[RowPlace], nonce: bytes
    ) -> tuple[Digest, int]:
        """Packs rows of any blocks of one schema into a fresh block, in this order. Gives (digest, length_bytes)."""
        ...

    async def compare(
        self, *, sources: Sequence[RowSource], pairs: Sequence[tuple[RowPlace, RowPlace]]
    ) -> tuple[bool, ...]:
        """Whether each pair is the same bytes, in order; two rows without a value are equal."""
        ...


class BlobKeeper(Protocol):
    """The blob service, for whoever decides what may go. Raises COORDINATOR_UNREACHABLE while it is away."""

    async def list_blobs(
        self, shelf: int, *, stored_before_ms: int, after: Digest | None, limit: int
    ) -> Sequence[Digest]:
        """Up to `limit` blobs whose digests begin with the byte `shelf`, rising, stored before that moment."""
        ...

    async def delete_blobs(
        self, digests: Sequence[Digest], *, decided_at_ms: int, packed_only: bool = False
    ) -> Sequence[Digest]:
        """Deletes what nothing refers to any more; gives what is gone.

        What was stored, or receipted, within the service's grace before `decided_at_ms` stays; with `packed_only`,
        packed inputs go at once and everything else stays.
        """
        ...
