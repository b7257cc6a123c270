"""The records of one job put together: who did which rows, under which commitment, and what came of it.

Records that contradict each other are told by name: a task settled by nobody's lease, rows given twice, a row missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fallow.checking_story import Checks, wrong
from fallow.job_records import (
    Abandoned,
    Committed,
    Corrected,
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

REFEREE = "referee"
"""A kind of task whose answer is a report, and no rows."""
STATES_FINAL = frozenset({"succeeded", "failed", "cancelled"})


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
    settled: list[tuple[At, Settled]] = field(default_factory=list[tuple[At, Settled]])
    """Audits and leases that came second, too."""
    checks: Checks = field(default_factory=Checks)
    tasks: dict[str, TaskMade] = field(default_factory=dict[str, TaskMade])
    leases: dict[str, Granted] = field(default_factory=dict[str, Granted])
    commitments: dict[str, Commitment] = field(default_factory=dict[str, Commitment])
    """By lease."""
    results: list[Result] = field(default_factory=list[Result])
    """By cursor."""
    rows: RangeSet = field(default_factory=RangeSet)
    """Job positions that are delivered."""
    withdrawn: dict[int, RangeSet] = field(default_factory=dict[int, RangeSet])
    """Job positions that a result gave and that were done again, by its number."""
    rows_failed_withdrawn: int = 0

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
                    if fact.cursor:
                        self._deliver(where, Result(at, task, None, None, fact))
                case None:
                    raise wrong(where, "is of a kind that this version does not know; use a newer fallow")
                case _:
                    self.checks.take(record.sequence, fact, self.tasks)
                    if isinstance(fact, Corrected):
                        self._withdraw(where, fact)

    @property
    def rows_failed(self) -> int:
        """Delivered rows without a value."""
        facts = [result.settled or result.abandoned for result in self.results]
        failed = sum(fact.rows_failed if isinstance(fact, Settled) else fact.rows for fact in facts if fact is not None)
        return failed - self.rows_failed_withdrawn

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
        self.checks.check_draws(
            {lease: (c.at.sequence, c.fact.message_digest) for lease, c in self.commitments.items()}
        )
        if self.state == "succeeded" and not self.checks.accepted and (row := self.checks.undecided()) is not None:
            raise wrong("verification.draws", f"row {row.row} of lease {row.lease_id} was drawn and never decided")
        return submitted

    def workers(self) -> dict[str, str]:
        """Workers by lease."""
        return {lease_id: lease.worker_id for lease_id, lease in self.leases.items()}

    def standing(self) -> dict[str, int]:
        """Rows by worker that are delivered and not withdrawn."""
        rows: dict[str, int] = {}
        for result in self.results:
            if result.commitment is not None:
                worker_id = result.commitment.lease.worker_id
                stands = RangeSet(result.task.spans) - self.withdrawn.get(result.cursor, RangeSet())
                rows[worker_id] = rows.get(worker_id, 0) + len(stands)
        return rows

    @property
    def paid_microcredits(self) -> int:
        """What the job paid for rows and audits, less what came back."""
        voided = sum(fact.microcredits for _, fact in self.checks.voided)
        return sum(fact.microcredits for _, fact in self.settled) - voided

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
        if task.kind == REFEREE and not fact.cursor:
            self.settled.append((at, fact))
            return
        commitment = self.commitments.get(fact.lease_id)
        if commitment is None or commitment.lease.task_id != fact.task_id:
            raise wrong(where, f"settles task {fact.task_id} without a commitment")
        committed = commitment.fact
        if (fact.rows, fact.rows_failed) != (committed.rows, committed.rows_failed):
            raise wrong(where, f"settles {fact.rows} rows where {committed.rows} are committed to")
        self.settled.append((at, fact))
        if fact.cursor:
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

    def _withdraw(self, where: str, fact: Corrected) -> None:
        gone = RangeSet(fact.spans)
        if gone - self.rows:
            raise wrong(where, "withdraws rows that are not delivered")
        self.rows = self.rows - gone
        self.withdrawn[fact.cursor] = self.withdrawn.get(fact.cursor, RangeSet()) | gone
        self.rows_failed_withdrawn += fact.rows_failed
