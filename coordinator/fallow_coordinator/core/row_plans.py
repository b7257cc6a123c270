"""What the blob service or the engine packs and compares: which rows of which blocks, in order."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from fallow.ids import AccountId, Digest, JobId, TaskId
from fallow.session import BlobReference, TaskKind
from fallow_coordinator.core.state import (
    Job,
    State,
    Task,
    TaskPhase,
)


@dataclass(frozen=True, slots=True)
class PackSource:
    """A block from which rows are packed, or with which they are compared."""

    digest: Digest
    length_bytes: int
    inline: bool
    """True: its bytes are a payload of the journal."""


@dataclass(frozen=True, slots=True)
class RowsPlan:
    """A candidate's block, to be packed of single rows, each as (source, row), in order."""

    sources: tuple[PackSource, ...]
    places: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    """Rows of the task that they answer, rising."""
    class_numbers: tuple[int, ...]
    """Their execution classes, as places in the plan's list."""

    @property
    def inline(self) -> bool:
        """Whether it can be packed from payloads alone."""
        return all(source.inline for source in self.sources)


@dataclass(frozen=True, slots=True)
class ComparePlan:
    """Rows of an audit, each beside the one that it checks, as (source, row)."""

    job_id: JobId
    task_id: TaskId
    sources: tuple[PackSource, ...]
    pairs: tuple[tuple[tuple[int, int], tuple[int, int]], ...]

    @property
    def inline(self) -> bool:
        """Whether the engine can compare at once, from payloads alone."""
        return all(source.inline for source in self.sources)


class _Sources:
    """Numbers blocks as they are named."""

    def __init__(self) -> None:
        self.listed: list[PackSource] = []
        self._numbers: dict[Digest, int] = {}

    def number(self, blob: BlobReference, *, inline: bool) -> int:
        if blob.digest not in self._numbers:
            self._numbers[blob.digest] = len(self.listed)
            self.listed.append(PackSource(blob.digest, blob.length_bytes, inline))
        return self._numbers[blob.digest]


def compare_plan(state: State, job_id: JobId, task_id: TaskId) -> ComparePlan | None:
    """What to compare for an audit that has settled, or None when nobody needs that (any more)."""
    verification = state.verifications.get(job_id)
    audit = verification.audits.get(task_id) if verification is not None else None
    if verification is None or audit is None or audit.compared or audit.output is None:
        return None
    sources = _Sources()
    own = sources.number(audit.output, inline=audit.inline)
    pairs: list[tuple[tuple[int, int], tuple[int, int]]] = []
    for index, row in enumerate(audit.checks):
        evidence = verification.evidences.get(row.lease_id)
        if evidence is None:
            # Nobody needs it any more: beside itself it is equal, and that is heard by nobody.
            pairs.append(((own, index), (own, index)))
        else:
            pairs.append(((own, index), (sources.number(evidence.output, inline=evidence.inline), row.row)))
    return ComparePlan(job_id, task_id, tuple(sources.listed), tuple(pairs))


def _candidates_of(state: State, task: Task) -> tuple[tuple[RowsPlan, ...], tuple[str, ...]]:
    """The candidates of a referee's task: rows that it checks, and those that audits gave in their stead."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    verification = state.verifications[task.job_id]
    classes: dict[str, int] = {}
    checked, differing = _Candidate(classes), _Candidate(classes)
    for index, row in enumerate(verification.refereed[task.task_id]):
        evidence = verification.evidences.get(row.checks.lease_id)
        if evidence is None:
            continue
        checked.add(index, evidence.output, evidence.execution_class, inline=evidence.inline, row=row.checks.row)
        audit_id = verification.audit_of.get(row.differing.lease_id) if row.differing is not None else None
        audit = verification.audits[audit_id] if audit_id is not None else None
        if audit is not None and audit.output is not None and row.differing is not None:
            differing.add(index, audit.output, audit.execution_class, inline=audit.inline, row=row.differing.row)
    return tuple(one.plan() for one in (checked, differing) if one.rows), tuple(classes)


class _Candidate:
    """Gathers the rows of one candidate."""

    def __init__(self, classes: dict[str, int]) -> None:
        self._classes = classes
        self._sources = _Sources()
        self._places: list[tuple[int, int]] = []
        self._class_numbers: list[int] = []
        self.rows: list[int] = []

    def add(self, index: int, block: BlobReference, execution_class: str, *, inline: bool, row: int) -> None:
        self.rows.append(index)
        self._places.append((self._sources.number(block, inline=inline), row))
        self._class_numbers.append(self._classes.setdefault(execution_class, len(self._classes)))

    def plan(self) -> RowsPlan:
        return RowsPlan(tuple(self._sources.listed), tuple(self._places), tuple(self.rows), tuple(self._class_numbers))


@dataclass(frozen=True, slots=True)
class PackPlan:
    """How a task's input is made: `spans` are (source, first row in it, rows), in packing order."""

    task_id: TaskId
    pack_number: int
    account_id: AccountId
    job_id: JobId
    sources: tuple[PackSource, ...]
    spans: tuple[tuple[int, int, int], ...]
    candidates: tuple[RowsPlan, ...] = ()
    """Of a referee's task: blocks to pack beside the input."""
    execution_classes: tuple[str, ...] = ()

    @property
    def rows_inline(self) -> bool:
        """Whether the rows themselves can be packed from payloads alone."""
        return all(source.inline for source in self.sources)

    @property
    def inline(self) -> bool:
        """Whether the engine can pack it at once, from payloads alone."""
        return self.rows_inline and all(plan.inline for plan in self.candidates)


def pack_plan(state: State, task_id: TaskId) -> PackPlan | None:
    """How to pack the task now, or None when it is not to be packed (any more)."""
    task = state.tasks.get(task_id)
    if task is None or task.phase is not TaskPhase.PACKING or task.job_id is None:
        return None
    job = state.jobs[task.job_id]
    sources = _Sources()
    spans: list[tuple[int, int, int]] = []
    for start, end in task.spans:
        for block, first, rows in _pieces(job, start, end):
            dataset = job.blocks[block]
            spans.append((sources.number(dataset.blob, inline=dataset.inline), first, rows))
    candidates, classes = _candidates_of(state, task) if task.kind is TaskKind.REFEREE else ((), ())
    return PackPlan(
        task_id, task.pack_number, job.account_id, job.job_id, tuple(sources.listed), tuple(spans), candidates, classes
    )


def _pieces(job: Job, start: int, end: int) -> list[tuple[int, int, int]]:
    """(block, first row in it, rows) that hold the job positions from `start` up to `end`."""
    made: list[tuple[int, int, int]] = []
    block = bisect_right(job.row_starts, start) - 1
    while start < end:
        rows = min(end, job.row_starts[block + 1]) - start
        if rows:
            made.append((block, start - job.row_starts[block], rows))
        start += rows
        block += 1
    return made
