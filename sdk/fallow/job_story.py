"""The records of one job put together: who did which rows, under which commitment, and what came of it.

Records that contradict each other are told by name: a task settled by nobody's lease, rows given twice, a row missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fallow.errors import FallowError, Reason
from fallow.job_records import (
    Abandoned,
    Committed,
    Fact,
    Funded,
    Granted,
    Moved,
    RawRecord,
    Settled,
    Submitted,
    TaskMade,
)
from fallow.ranges import RangeSet

STATES_FINAL = frozenset({"succeeded", "failed", "cancelled"})


def wrong(where: str, what: str) -> FallowError:
    """The error that names what is wrong in a certificate or its evidence."""
    return FallowError(Reason.EVIDENCE_WRONG, f"{where}: {what}", field=where)


@dataclass(frozen=True, slots=True)
class At:
    """Where a fact stands in the journal."""

    sequence: int
    at_ms: int
    event: bytes


@dataclass(frozen=True, slots=True)
class Commitment:
    """A worker's word on output rows, and the lease under which it gave it."""

    at: At
    fact: Committed
    lease: Granted
    session_id: str
    """In which it was signed."""


@dataclass(frozen=True, slots=True)
class Result:
    """Rows of the job that are delivered."""

    at: At
    task: TaskMade
    settled: Settled | None
    commitment: Commitment | None
    abandoned: Abandoned | None
    """Set where the other two are not: nobody could do the rows."""

    @property
    def cursor(self) -> int:
        """The job's result number."""
        fact = self.settled or self.abandoned
        assert fact is not None, "a result has either"
        return fact.cursor

    @property
    def path(self) -> str:
        """How a certificate calls it."""
        return f"results[{self.cursor - 1}]"


@dataclass(slots=True)
class Story:
    """One job, told by its records. Read records in with `read`, then call `finish`."""

    sessions: dict[int, str] = field(default_factory=dict[int, str])
    """Sessions of commitments, by record, where they are not their lease's."""
    submitted: Submitted | None = None
    submitted_at_ms: int = 0
    ended_at_ms: int = 0
    state: str = ""
    reason: str = ""
    funded_microcredits: int = 0
    tasks: dict[str, TaskMade] = field(default_factory=dict[str, TaskMade])
    leases: dict[str, Granted] = field(default_factory=dict[str, Granted])
    commitments: dict[str, Commitment] = field(default_factory=dict[str, Commitment])
    """By lease."""
    results: list[Result] = field(default_factory=list[Result])
    """By cursor."""
    rows: RangeSet = field(default_factory=RangeSet)
    """Job positions that are delivered."""

    def read(self, facts: Iterable[tuple[RawRecord, Fact | None]]) -> None:
        """Takes in records, in the journal's order. Raises EVIDENCE_WRONG, naming the record."""
        for record, fact in facts:
            at = At(record.sequence, record.at_ms, record.event)
            where = f"record {record.sequence}"
            match fact:
                case Submitted():
                    if self.submitted is not None:
                        raise wrong(where, "submits a second job")
                    self.submitted, self.submitted_at_ms = fact, at.at_ms
                case Moved(state, reason):
                    self.state, self.reason = state, reason
                    self.ended_at_ms = at.at_ms if state in STATES_FINAL else 0
                case Funded(microcredits):
                    self.funded_microcredits += microcredits
                case TaskMade():
                    self.tasks[fact.task_id] = fact
                case Granted():
                    if fact.task_id not in self.tasks:
                        raise wrong(where, f"leases task {fact.task_id}, which is none of this job's")
                    self.leases[fact.lease_id] = fact
                case Committed():
                    self._commit(at, where, fact)
                case Settled():
                    self._settle(at, where, fact)
                case Abandoned():
                    task = self._task(where, fact.task_id)
                    self._deliver(where, Result(at, task, None, None, fact))
                case None:
                    raise wrong(where, "is of a kind that this version does not know; use a newer fallow")

    @property
    def rows_failed(self) -> int:
        """Delivered rows without a value."""
        facts = [result.settled or result.abandoned for result in self.results]
        return sum(fact.rows_failed if isinstance(fact, Settled) else fact.rows for fact in facts if fact is not None)

    def finish(self) -> Submitted:
        """The job, once all records are read. Raises EVIDENCE_WRONG unless it has ended with all its rows accounted."""
        submitted = self.submitted
        if submitted is None:
            raise wrong("records", "none of them submits the job")
        if self.state not in STATES_FINAL:
            raise wrong("records", f"the job is {self.state or 'not queued'}; it has not ended")
        self.results.sort(key=lambda result: result.cursor)
        if [result.cursor for result in self.results] != list(range(1, len(self.results) + 1)):
            raise wrong("records", "results are missing or double")
        if self.state == "succeeded" and self.rows != RangeSet.of(0, submitted.rows):
            raise wrong("records", f"{len(self.rows)} of {submitted.rows} rows are delivered, yet the job succeeded")
        return submitted

    def _task(self, where: str, task_id: str) -> TaskMade:
        if (task := self.tasks.get(task_id)) is None:
            raise wrong(where, f"speaks of task {task_id}, which is none of this job's")
        return task

    def _commit(self, at: At, where: str, fact: Committed) -> None:
        if (lease := self.leases.get(fact.lease_id)) is None:
            raise wrong(where, f"commits under lease {fact.lease_id}, which was not granted")
        session_id = self.sessions.get(at.sequence, lease.session_id)
        self.commitments[fact.lease_id] = Commitment(at, fact, lease, session_id)

    def _settle(self, at: At, where: str, fact: Settled) -> None:
        task = self._task(where, fact.task_id)
        commitment = self.commitments.get(fact.lease_id)
        if commitment is None or commitment.lease.task_id != fact.task_id:
            raise wrong(where, f"settles task {fact.task_id} without a commitment")
        committed = commitment.fact
        if (fact.rows, fact.rows_failed) != (committed.rows, committed.rows_failed):
            raise wrong(where, f"settles {fact.rows} rows where {committed.rows} are committed to")
        self._deliver(where, Result(at, task, fact, commitment, None))

    def _deliver(self, where: str, result: Result) -> None:
        fact = result.settled or result.abandoned
        assert fact is not None, "a result has either"
        fresh = RangeSet(result.task.spans)
        if len(fresh) != fact.rows:
            raise wrong(where, f"delivers {fact.rows} rows for {len(fresh)} positions")
        if not self.rows.isdisjoint(fresh):
            raise wrong(where, "delivers rows that are delivered already")
        self.rows = self.rows | fresh
        self.results.append(result)
