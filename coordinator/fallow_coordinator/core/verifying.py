"""Decisions about verifying results: which checks start now, what was found, and what follows from it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from fallow.comparison import CandidateFinding, Finding
from fallow.errors import FallowError, Reason
from fallow.ids import JobId, LeaseId, PartyId, TaskId
from fallow.job import JOB_STATES_FINAL, JobState
from fallow.limits import BLOCK_BYTES_MAX, INLINE_PAYLOAD_BYTES_MAX, REFEREE_ROWS_MAX
from fallow.ranges import RangeSet
from fallow.roles import Tier
from fallow.session import Cause, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.cutting import Layout, cost_of, unit_micros
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.draws import topped_up
from fallow_coordinator.core.evidence import Disputed, Evidence, Stand, Verification
from fallow_coordinator.core.funding import resumed
from fallow_coordinator.core.groups import numbers_in
from fallow_coordinator.core.limits import (
    AUDIT_PATIENCE_MS,
    AUDIT_ROWS_MAX,
    AUDITORS_LOOKED_AT_MAX,
    AUDITS_LIVE_MAX,
    REDONE_MAX,
    REFEREES_LIVE_MAX,
    TASK_BLOCKS_MAX,
    TASK_UNIT_MICROS_MAX,
    TASK_UNITS_TARGET,
    TIES_MAX,
    UNIT_MICROS,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.needs import REFEREEING, misfit
from fallow_coordinator.core.shares import share_key_after
from fallow_coordinator.core.state import Job, Lane, Lease, State, Task, TaskPhase, Worker
from fallow_coordinator.core.tolerances import Sample, learned
from fallow_coordinator.core.verification_events import EvidenceRow, Verdict

_STANDING = frozenset({Finding.EQUAL, Finding.WITHIN_TOLERANCE})
_OUTPUT_ROW_OVERHEAD_BYTES = 64


# ------------------------------------------------------------------------------------------------- what can start


def next_step(state: State, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """The next thing that verifying jobs need: a release, a task that checks or does rows again, or the job's end."""
    for job_id, verification in state.verifications.items():
        job = state.jobs[job_id]
        made = _released(state, verification)
        if not made and not job.parked:
            made = (
                _redo(state, job, verification, names)
                or _audit(state, job, verification, now_ms, names)
                or _referee(state, job, verification, names)
                or _concluded(state, job, verification)
            )
        if made:
            return made
    return ()


def _released(state: State, verification: Verification) -> tuple[e.Event, ...]:
    """Pay of evidences of which enough was checked, and of audits that are in no dispute."""
    if not verification.releasable and not verification.audits_done:
        return ()
    evidences = (verification.evidences[lease_id] for lease_id in verification.releasable)
    return (
        *(_release_of(state, verification, evidence) for evidence in evidences),
        *_audits_released(state, verification, verification.audits_done),
    )


def _release_of(
    state: State, verification: Verification, evidence: Evidence, *, accepted: bool = False
) -> v.EvidenceReleased:
    return v.EvidenceReleased(
        lease_id=evidence.lease_id,
        job_id=verification.job_id,
        worker_id=evidence.worker_id,
        account_id=state.workers[evidence.worker_id].account_id,
        microcredits=evidence.microcredits,
        accepted=accepted,
    )


def _audits_released(
    state: State, verification: Verification, task_ids: Iterable[TaskId]
) -> Iterator[v.EvidenceReleased]:
    """Ends audits that have settled."""
    for task_id in task_ids:
        audit = verification.audits[task_id]
        if audit.lease_id is not None and audit.worker_id is not None:
            yield v.EvidenceReleased(
                lease_id=audit.lease_id,
                job_id=verification.job_id,
                worker_id=audit.worker_id,
                account_id=state.workers[audit.worker_id].account_id,
                microcredits=audit.microcredits,
            )


def _redo(state: State, job: Job, verification: Verification, names: Names) -> tuple[e.Event, ...]:
    """Withdrawn rows of one result go into a task, which is no larger than the one that gave them."""
    if not verification.redo:
        return ()
    cursor = next(iter(verification.redo.values()))[1]
    spans = sorted((start, end) for start, (end, corrects) in verification.redo.items() if corrects == cursor)
    created = _task(state, job, TaskKind.MAP, tuple(spans), names, corrects=cursor)
    return created, e.PackRequested(task_id=created.task_id, pack_number=1)


def _audit(state: State, job: Job, verification: Verification, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """Rows that wait for an audit go into a task that looks like any other, for a worker that may audit them."""
    if not verification.audit_due:
        return ()
    wanting = state.lanes[job.lane].groups & (state.wanting_groups | state.hungry_groups)
    if not wanting or _audits_live(verification) >= AUDITS_LIVE_MAX:
        return ()
    first = next(iter(next(iter(verification.audit_due.values()))))
    size = min(AUDIT_ROWS_MAX, verification.evidences[first.lease_id].rows)
    tail = job.next_row == job.rows
    if not tail and sum(map(len, verification.audit_due.values())) < size:
        return ()
    for worker in _auditors(state, wanting):
        owners = [owner for owner in verification.audit_due if may_audit(state, owner, worker)]
        if not owners or (not tail and sum(len(verification.audit_due[owner]) for owner in owners) < size):
            continue
        wanted = size - int.from_bytes(names.draw()[:4], "big") % (size // 2 + 1)
        due = (row for owner in owners for row in verification.audit_due[owner])
        return _checking(state, job, verification, TaskKind.MAP, due, wanted, names, now_ms)
    return ()


def _audits_live(verification: Verification) -> int:
    return sum(audit.lease_id is None for audit in verification.audits.values())


def _auditors(state: State, groups: int) -> Iterator[Worker]:
    """Workers that could take an audit soon, some of each group."""
    for number in numbers_in(groups):
        group = state.groups[number]
        free = (worker_id for _, _, worker_id in group.cheapest)
        for worker_id in islice(free if group.cheapest else group.members, AUDITORS_LOOKED_AT_MAX):
            if state.workers[worker_id].room:
                yield state.workers[worker_id]


def _referee(state: State, job: Job, verification: Verification, names: Names) -> tuple[e.Event, ...]:
    """Rows that wait for a referee go into a task, when an operator's worker that can do it is connected."""
    if not verification.referee_due or len(verification.refereed) >= REFEREES_LIVE_MAX or not referees(state):
        return ()
    due = iter(verification.referee_due)
    return _checking(state, job, verification, TaskKind.REFEREE, due, REFEREE_ROWS_MAX, names, 0)


def referees(state: State) -> bool:
    """Whether an operator's worker that referees takes work."""
    return any(group.window_total and misfit(REFEREEING, group.ability) is None for group in state.groups.values())


def _checking(
    state: State,
    job: Job,
    verification: Verification,
    kind: TaskKind,
    due: Iterator[EvidenceRow],
    wanted: int,
    names: Names,
    now_ms: int,
) -> tuple[e.Event, ...]:
    rows = sorted(
        _fitting(state, job, verification, due, wanted, candidates=kind is TaskKind.REFEREE),
        key=lambda row: verification.evidences[row.lease_id].position_of(row.row),
    )
    positions = (verification.evidences[row.lease_id].position_of(row.row) for row in rows)
    spans = tuple((position, position + 1) for position in positions)
    created = _task(state, job, kind, spans, names, checks=tuple(rows), now_ms=now_ms)
    return created, e.PackRequested(task_id=created.task_id, pack_number=1)


def _fitting(
    state: State,
    job: Job,
    verification: Verification,
    due: Iterator[EvidenceRow],
    wanted: int,
    *,
    candidates: bool,
) -> list[EvidenceRow]:
    """Up to `wanted` rows whose inputs, and outputs, fit into a block each, however unequal rows are."""
    report = state.bundles[job.bundle_digest].report
    assert report is not None, "a job runs when its bundle is inspected"
    layout = Layout(job.row_starts, job.byte_starts)
    row_bytes = state.bundles[job.bundle_digest].output_row_bytes + _OUTPUT_ROW_OVERHEAD_BYTES
    wanted = max(1, min(wanted, BLOCK_BYTES_MAX // row_bytes))
    cost, cost_max = 0, TASK_UNITS_TARGET * UNIT_MICROS
    blocks: set[int] = set()
    outputs: set[LeaseId] = set()
    source_bytes = output_bytes = 0
    output_bytes_max = BLOCK_BYTES_MAX
    taken: list[EvidenceRow] = []
    for row in due:
        evidence = verification.evidences[row.lease_id]
        position = evidence.position_of(row.row)
        block = layout.block_of(position)
        if block not in blocks:
            blocks.add(block)
            source_bytes += job.blocks[block].blob.length_bytes
        if candidates and row.lease_id not in outputs:
            outputs.add(row.lease_id)
            output_bytes += evidence.output.length_bytes
            if evidence.inline:
                output_bytes_max = INLINE_PAYLOAD_BYTES_MAX
        cost += unit_micros(layout, cost_of(job, report), position, position + 1)
        full = cost > cost_max or len(blocks) > TASK_BLOCKS_MAX
        full |= source_bytes > BLOCK_BYTES_MAX or output_bytes > output_bytes_max
        if taken and full:
            break
        taken.append(row)
        if len(taken) == wanted:
            break
    return taken


def _task(
    state: State,
    job: Job,
    kind: TaskKind,
    spans: tuple[tuple[int, int], ...],
    names: Names,
    *,
    checks: tuple[EvidenceRow, ...] = (),
    corrects: int = 0,
    now_ms: int = 0,
) -> e.TaskCreated:
    report = state.bundles[job.bundle_digest].report
    assert report is not None, "a job runs when its bundle is inspected"
    layout, rates = Layout(job.row_starts, job.byte_starts), cost_of(job, report)
    cost = min(TASK_UNIT_MICROS_MAX, sum(unit_micros(layout, rates, start, end) for start, end in spans))
    share_key = state.accounts[job.account_id].share_key
    return e.TaskCreated(
        task_id=TaskId(names.new("task")),
        kind=kind,
        job_id=job.job_id,
        bundle_digest=job.bundle_digest,
        pool_id=job.pool_id,
        spans=spans,
        unit_micros=cost,
        # What is done again was counted once, and referees are the operator's own.
        share_key=share_key_after(share_key, cost, now_ms) if now_ms else 0,
        checks=checks,
        corrects=corrects,
    )


def _concluded(state: State, job: Job, verification: Verification) -> tuple[e.Event, ...]:
    """Once all rows are there and all that was drawn is decided: further draws, or the end."""
    if job.state is not JobState.VERIFYING or verification.open_rows or len(job.done) < job.rows:
        return ()
    return topped_up(state, job, verification) or _ended(state, job, verification, accepted=False)


def _ended(state: State, job: Job, verification: Verification, *, accepted: bool) -> tuple[e.Event, ...]:
    draft = Draft(state)
    draft.events += [
        _release_of(state, verification, evidence, accepted=accepted) for evidence in verification.evidences.values()
    ]
    draft.events += _audits_released(state, verification, verification.audits)
    draft.conclude(job)
    return tuple(draft.events)


# ------------------------------------------------------------------------------------------------- who may audit


def may_audit(state: State, owner_id: PartyId, worker: Worker) -> bool:
    """Whether a worker may check the rows of another: of another account, token and machine.

    Of a managed fleet, whose machines are one organisation's, another machine is enough.
    """
    owner = state.workers[owner_id]
    if owner_id == worker.worker_id:
        return False
    if owner.machine_digest and owner.machine_digest == worker.machine_digest:
        return False
    if owner.tier is Tier.MANAGED:
        return True
    token_id = state.parties[owner_id].token_id
    same_token = token_id is not None and token_id == state.parties[worker.worker_id].token_id
    return owner.account_id != worker.account_id and not same_token


def may_take(state: State, task: Task, worker: Worker) -> bool:
    """Whether a worker may have this task, whoever else fits: not its own rows to check, nothing of a job to which it
    is a stranger.
    """
    if task.kind is not TaskKind.MAP or task.job_id is None or task.job_id not in state.verifications:
        return True
    verification = state.verifications[task.job_id]
    if worker.worker_id in verification.strangers:
        return False
    if not task.checks:
        return True
    audited = verification.audits[task.task_id].audited
    return all(may_audit(state, owner_id, worker) for owner_id in audited)


def has_strangers(state: State, task: Task) -> bool:
    """Whether some workers may have nothing of the task's job."""
    verification = state.verifications.get(task.job_id) if task.job_id is not None else None
    return verification is not None and bool(verification.strangers)


def others_may_audit(state: State, lane: Lane, task: Task) -> bool:
    """Whether a connected worker on which an audit has not failed may have it, busy or not."""
    assert task.job_id is not None, "audits are a job's"
    audited = state.verifications[task.job_id].audits[task.task_id].audited
    return _audited_by_any(state, lane.groups, audited, avoid=task.avoid)


def given_up(state: State, now_ms: int) -> list[e.Event]:
    """Audits for which nobody has been connected for a while go to a referee, when one is."""
    made: list[e.Event] = []
    if not state.verifications or not referees(state):
        return made
    for job_id, verification in state.verifications.items():
        lane = state.lanes[state.jobs[job_id].lane]
        for task_id, audit in verification.audits.items():
            task = state.tasks.get(task_id)
            if (
                task is not None
                and task.phase is TaskPhase.READY
                and not _audited_by_any(state, lane.groups, audit.audited)
            ):
                made.append(e.TaskDropped(task_id=task_id))
        for owner_id, rows in verification.audit_due.items():
            newest = verification.evidences[next(reversed(rows)).lease_id]
            waited = now_ms - newest.settled_at_ms >= AUDIT_PATIENCE_MS
            if waited and not _audited_by_any(state, lane.groups, (owner_id,)):
                made.append(
                    v.AuditGivenUp(
                        job_id=job_id,
                        rows=tuple(islice(rows, AUDIT_ROWS_MAX)),
                        reason="no worker of another account, token and machine is connected",
                    )
                )
    return made


def _audited_by_any(state: State, groups: int, owners: Iterable[PartyId], *, avoid: Container[PartyId] = ()) -> bool:
    owners = tuple(owners)
    for number in numbers_in(groups):
        for worker_id in state.groups[number].members:
            worker = state.workers[worker_id]
            if (
                worker.room
                and worker_id not in avoid
                and all(may_audit(state, owner_id, worker) for owner_id in owners)
            ):
                return True
    return False


# ------------------------------------------------------------------------------------------------- what was found


def record_comparison(state: State, command: c.RecordComparison) -> Decision:
    """Rows of an audit are equal to those that they check, or in dispute. A second answer changes nothing."""
    verification = state.verifications.get(command.job_id)
    audit = verification.audits.get(command.task_id) if verification is not None else None
    if audit is None or audit.compared or audit.lease_id is None or audit.worker_id is None:
        return Decision()
    assert len(command.equal) == len(audit.checks), "each row is compared"
    compared = v.AuditCompared(
        task_id=command.task_id,
        lease_id=audit.lease_id,
        job_id=command.job_id,
        worker_id=audit.worker_id,
        equal=command.equal,
    )
    return Decision((compared,))


def comparison_failed(state: State, command: c.ComparisonFailed) -> Decision:
    """The audit says nothing; a referee looks at its rows."""
    verification = state.verifications.get(command.job_id)
    audit = verification.audits.get(command.task_id) if verification is not None else None
    if verification is None or audit is None or audit.compared or audit.lease_id is None:
        return Decision()
    rows = tuple(row for row in audit.checks if verification.checked_by(row, audit.task_id) is not None)
    reason = shortened(f"its rows could not be compared: {command.reason}")
    released = tuple(_audits_released(state, verification, (audit.task_id,)))
    return Decision((v.AuditGivenUp(job_id=command.job_id, rows=rows, reason=reason), *released))


def fault_of_findings(state: State, task: Task, command: c.ReportReferee) -> str:
    """What is wrong with a referee's report, or nothing."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    verification = state.verifications[task.job_id]
    if [found.row for found in command.findings] != list(range(task.rows)):
        return f"the report has {len(command.findings)} rows, the task has {task.rows}"
    for found, row in zip(command.findings, task.checks, strict=True):
        needed = verification.checked_by(row, task.task_id) is not None
        if needed and (not found.candidates or found.candidates[0].finding is None):
            return f"the report says nothing of row {found.row}"
    return ""


@dataclass(slots=True)
class _Guilt:
    """Why somebody is proven wrong."""

    verdict: Verdict
    lease_id: LeaseId
    row: int


@dataclass(slots=True)
class _Outcome:
    """What a referee's report adds up to."""

    verdicts: list[v.VerdictReached] = field(default_factory=list[v.VerdictReached])
    guilty: dict[PartyId, _Guilt] = field(default_factory=dict[PartyId, _Guilt])
    upheld: set[EvidenceRow] = field(default_factory=set[EvidenceRow])
    again: dict[EvidenceRow, bool] = field(default_factory=dict[EvidenceRow, bool])
    """Rows to be done again without guilt; whether each had no value."""


def refereed(state: State, draft: Draft, task: Task, lease: Lease, command: c.ReportReferee) -> None:
    """The verdicts of a report and what follows from them."""
    assert task.job_id is not None, "referees decide about jobs' rows"
    job, verification = state.jobs[task.job_id], state.verifications[task.job_id]
    draft.events.append(
        v.RefereeReported(
            task_id=task.task_id,
            lease_id=lease.lease_id,
            job_id=job.job_id,
            worker_id=lease.worker_id,
            own_root=command.own_root,
            execution_class=command.execution_class,
            findings=command.findings,
            message_digest=command.message_digest,
            signature=command.signature,
            sequence=command.sequence,
        )
    )
    samples = _samples(state, verification, task, command)
    draft.events += learned(task.bundle_digest, command.execution_class, samples)
    outcome = _outcome(verification, task, lease.lease_id, command)
    draft.events += outcome.verdicts
    withdrawn = False
    for worker_id, guilt in outcome.guilty.items():
        withdrawn |= _annul(state, draft, verification, worker_id, guilt, outcome.upheld)
    for row, had_none in outcome.again.items():
        evidence = verification.evidences[row.lease_id]
        if evidence.worker_id not in outcome.guilty:
            withdrawn = True
            draft.events.append(_done_again(job.job_id, evidence, row.row, had_none=had_none))
    if withdrawn and job.state is JobState.VERIFYING:
        draft.events.append(e.JobStateChanged(job.job_id, JobState.RUNNING, "", ""))


def _samples(state: State, verification: Verification, task: Task, command: c.ReportReferee) -> Iterator[Sample]:
    """Rows that nobody's dispute brought before the referee: what they show of their classes may be learned."""
    for disputed, found in zip(verification.refereed[task.task_id], command.findings, strict=True):
        if disputed.differing is None and verification.checked_by(disputed.checks, task.task_id) is not None:
            evidence = verification.evidences[disputed.checks.lease_id]
            account_id = state.workers[evidence.worker_id].account_id
            yield Sample(account_id, evidence.execution_class, found.candidates[0])


def _outcome(verification: Verification, task: Task, lease_id: LeaseId, command: c.ReportReferee) -> _Outcome:
    made = _Outcome()
    for disputed, found in zip(verification.refereed[task.task_id], command.findings, strict=True):
        row = disputed.checks
        checked = verification.checked_by(row, task.task_id)
        if checked is not None:
            evidence = verification.evidences[row.lease_id]
            verdict = _verdict(verification, evidence, row.row, checked.ties, found.candidates[0], command)
            if verdict is not None:
                made.verdicts.append(
                    v.VerdictReached(
                        task.job_id or JobId(""), row.lease_id, row.row, evidence.worker_id, verdict, lease_id
                    )
                )
            if verdict is Verdict.PROVEN_WRONG or verdict is Verdict.UNEXPLAINED:
                known = made.guilty.get(evidence.worker_id)
                if known is None or known.verdict is Verdict.UNEXPLAINED:
                    made.guilty[evidence.worker_id] = _Guilt(verdict, row.lease_id, row.row)
            elif verdict is Verdict.DONE_AGAIN:
                made.again[row] = found.candidates[0].finding is Finding.WITHHELD
            elif verdict is not None:
                made.upheld.add(row)
        _judge_auditor(verification, disputed, found.candidates, lease_id, made)
    return made


def _verdict(
    verification: Verification,
    evidence: Evidence,
    row: int,
    ties: int,
    found: CandidateFinding,
    command: c.ReportReferee,
) -> Verdict | None:
    """What a finding means for the row; None: the referee looks once more."""
    if found.finding in _STANDING:
        return Verdict.UPHELD
    if found.finding is Finding.WRONG:
        return Verdict.PROVEN_WRONG
    if found.finding is Finding.TIE:
        return Verdict.TIE if ties + 1 >= TIES_MAX else None
    if found.finding is Finding.UNEXPLAINED and evidence.execution_class != command.execution_class:
        # Else a class that nobody shares would cost a cheater no more than the rows that are drawn.
        return Verdict.UNEXPLAINED
    # Not steady, or withheld: nobody's guilt. What others could not do better either stands as it is.
    done = verification.redone.get(evidence.position_of(row), 0)
    return Verdict.DONE_AGAIN if done < REDONE_MAX else Verdict.TIE


def _judge_auditor(
    verification: Verification,
    disputed: Disputed,
    candidates: tuple[CandidateFinding, ...],
    lease_id: LeaseId,
    made: _Outcome,
) -> None:
    differing = disputed.differing
    if differing is None or len(candidates) < 2 or candidates[1].finding is not Finding.WRONG:
        return
    audit_id = verification.audit_of.get(differing.lease_id)
    audit = verification.audits[audit_id] if audit_id is not None else None
    if audit is None or audit.worker_id is None:
        return
    verdict = Verdict.AUDITOR_WRONG
    job_id = verification.job_id
    made.verdicts.append(
        v.VerdictReached(job_id, differing.lease_id, differing.row, audit.worker_id, verdict, lease_id)
    )
    made.guilty.setdefault(audit.worker_id, _Guilt(verdict, differing.lease_id, differing.row))


# ------------------------------------------------------------------------------------------------- what follows


def _annul(
    state: State,
    draft: Draft,
    verification: Verification,
    worker_id: PartyId,
    guilt: _Guilt,
    upheld: set[EvidenceRow],
) -> bool:
    """A proven lie: no record, no pay, no further work of verifying jobs; what was not checked is done again.

    A row that nothing explains: no pay and no further work of this job alone. Gives whether rows were withdrawn.
    """
    worker = state.workers[worker_id]
    strange = guilt.verdict is Verdict.UNEXPLAINED
    what = "its audit of a row" if guilt.verdict is Verdict.AUDITOR_WRONG else "a row"
    how = "lies further from a referee's than rounding explains" if strange else "is proven wrong"
    reason = f"{what} of job {verification.job_id} {how} (lease {guilt.lease_id}, row {guilt.row})"
    if not strange and not worker.distrusted_reason:
        draft.events.append(
            v.WorkerDistrusted(worker_id, verification.job_id, guilt.lease_id, guilt.row, shortened(reason))
        )
    share = verification.shares.get(worker_id)
    evidences = [verification.evidences[lease_id] for lease_id in share.leases] if share is not None else []
    audits = [audit for audit in verification.audits.values() if audit.worker_id == worker_id]
    voided = sum(evidence.microcredits for evidence in evidences) + sum(audit.microcredits for audit in audits)
    if voided:
        draft.events.append(v.PayVoided(verification.job_id, worker_id, worker.account_id, voided))
    withdrawn = False
    annulled = {evidence.lease_id for evidence in evidences}
    for task_id in (*verification.refereed, *verification.audits):
        task = state.tasks.get(task_id)
        if task is not None and task.lease_id is None and all(row.lease_id in annulled for row in task.checks):
            draft.events.append(e.TaskDropped(task_id=task_id))
    for evidence in evidences:
        corrected = _withdrawn(verification.job_id, evidence, guilt.verdict, reason, upheld)
        withdrawn |= bool(corrected.spans)
        draft.events.append(corrected)
    for lease_id in tuple(worker.leases):
        lease = state.leases[lease_id]
        task = state.tasks[lease.task_id]
        concerned = task.job_id == verification.job_id if strange else task.job_id in state.verifications
        if concerned and task.kind is TaskKind.MAP:
            draft.end_lease(lease, e.LeaseOutcome.REVOKED, Cause.PLATFORM, f"a row of its worker {how}")
    return withdrawn


def _withdrawn(
    job_id: JobId, evidence: Evidence, verdict: Verdict, reason: str, upheld: set[EvidenceRow]
) -> v.RowsCorrected:
    """Everything of an evidence that was not checked and does not stand."""
    keeps = evidence.rows_failed <= len(evidence.failed_rows)
    gone = {row for row, checked in evidence.checked.items() if checked.stand is Stand.WITHDRAWN}
    kept = gone | {
        row
        for row, checked in evidence.checked.items()
        if keeps and (checked.stand is Stand.PASSED or EvidenceRow(evidence.lease_id, row) in upheld)
    }
    rows = [row for row in range(evidence.rows) if row not in kept]
    # Failures beyond those that are listed are somewhere among all rows: then all of them are done again.
    failed = sum(row in evidence.failed_rows for row in rows) if keeps else evidence.rows_failed
    return v.RowsCorrected(
        job_id=job_id,
        lease_id=evidence.lease_id,
        cursor=evidence.cursor,
        spans=RangeSet.of_positions(evidence.position_of(row) for row in rows).ranges,
        rows_failed=failed,
        verdict=verdict,
        reason=shortened(reason),
    )


def _done_again(job_id: JobId, evidence: Evidence, row: int, *, had_none: bool) -> v.RowsCorrected:
    position = evidence.position_of(row)
    reason = "it has no value, and a referee found one" if had_none else "it differs from a referee's without a reason"
    return v.RowsCorrected(
        job_id=job_id,
        lease_id=evidence.lease_id,
        cursor=evidence.cursor,
        spans=((position, position + 1),),
        rows_failed=int(had_none),
        verdict=Verdict.DONE_AGAIN,
        reason=reason,
    )


# ------------------------------------------------------------------------------------------------- people


def accept_assurance(state: State, command: c.AcceptAssurance) -> Decision:
    """The job succeeds with the checks made by now. Once it has ended nothing happens.

    Raises JOB_UNKNOWN, JOB_UNFINISHED while rows are missing, FIELD_INVALID for a job without an assurance.
    """
    job = state.jobs.get(command.job_id)
    if job is None or job.account_id != command.account_id:
        raise FallowError(Reason.JOB_UNKNOWN, f"this account has no job {command.job_id}", field="job_id")
    if job.state in JOB_STATES_FINAL:
        return Decision()
    verification = state.verifications.get(job.job_id)
    if verification is None:
        raise FallowError(
            Reason.FIELD_INVALID,
            "the job was submitted without an assurance",
            field="job_id",
            limit="a job in state verifying",
        )
    if len(job.done) < job.rows:
        raise FallowError(
            Reason.JOB_UNFINISHED,
            f"the job is {job.state.value}: {job.rows - len(job.done)} of {job.rows} rows are not there yet",
            field="job_id",
            limit="a job in state verifying",
        )
    # One that cannot pay for its checks need not wait for a top-up.
    goes_on = (resumed(job),) if job.state is JobState.PAUSED else ()
    accepted = v.AssuranceAccepted(job.job_id)
    return Decision((*goes_on, accepted, *_ended(state, job, verification, accepted=True)))
