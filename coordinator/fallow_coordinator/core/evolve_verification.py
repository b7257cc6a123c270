"""How events about verifying results change the state, and what tasks that check rows mean for them."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from fallow.comparison import Finding
from fallow.ids import JobId, PartyId
from fallow.job import ACCEPTED, TRUSTED, VERIFIED, RowChecks
from fallow.session import TaskKind
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.evidence import (
    OPEN_STANDS,
    Audit,
    CheckedRow,
    Disputed,
    Evidence,
    Share,
    Stand,
    Verification,
)
from fallow_coordinator.core.groups import place, unplace
from fallow_coordinator.core.state import CommitmentFacts, Job, Lease, State, Task
from fallow_coordinator.core.verification_events import EvidenceRow, Trust, Verdict

ANNULLING = frozenset({Verdict.PROVEN_WRONG, Verdict.AUDITOR_WRONG, Verdict.UNEXPLAINED})
"""Verdicts after which nothing counts that the worker did in the job and that was not checked itself."""


def evolve_verification(state: State, event: v.VerificationEvent, at_ms: int) -> None:
    """Applies one event about verifying results."""
    match event:
        case v.DrawSecretSet():
            assert event.job_id not in state.verifications, "a job has one key"
            state.verifications[event.job_id] = Verification(event.job_id, event.secret)
            state.jobs[event.job_id].checks = RowChecks()
        case v.AuditsDrawn():
            _draw(state, event, at_ms)
        case v.AuditCompared():
            _compare(state, event)
        case v.AuditGivenUp():
            _give_up(state.verifications[event.job_id], event)
        case v.RefereeReported():
            _report(state.verifications[event.job_id], event)
        case v.VerdictReached():
            _judge(state, event)
        case v.RowsCorrected():
            _correct(state, event)
        case v.EvidenceReleased():
            _release(state, event)
        case v.PayVoided():
            _void(state, event)
        case v.WorkerDistrusted():
            worker = state.workers[event.worker_id]
            unplace(state, worker)
            worker.distrusted_reason = event.reason
            worker.rows_verified = 0
            place(state, worker)
        case v.WorkerTrusted():
            worker = state.workers[event.worker_id]
            unplace(state, worker)
            worker.distrusted_reason = ""
            place(state, worker)
        case v.AssuranceAccepted():
            state.jobs[event.job_id].checks = replace(checks_of(state, event.job_id), accepted=True)
        case _:
            assert_never(event)


def checks_of(state: State, job_id: JobId) -> RowChecks:
    """How the rows of a verifying job stand; it stays with the job when it has ended."""
    checks = state.jobs[job_id].checks
    assert checks is not None, "a verifying job counts"
    return checks


def _count(state: State, job_id: JobId, **more: int) -> None:
    """Adds to some counts of a verifying job."""
    checks = checks_of(state, job_id)
    state.jobs[job_id].checks = replace(checks, **{name: getattr(checks, name) + rows for name, rows in more.items()})


# ------------------------------------------------------------------------------------------------- draws


def _draw(state: State, event: v.AuditsDrawn, at_ms: int) -> None:
    verification = state.verifications[event.job_id]
    job = state.jobs[event.job_id]
    if event.trust is not Trust.NONE:
        _count(state, verification.job_id, rows_trusted=event.rows)
        job.results[event.cursor - 1] = replace(job.results[event.cursor - 1], status=TRUSTED)
        return
    evidence = verification.evidences.get(event.lease_id)
    if evidence is None:
        evidence = _evidence(state, job, event, at_ms)
        verification.evidences[event.lease_id] = evidence
        verification.shares.setdefault(event.worker_id, Share()).leases[event.lease_id] = None
    refereed = frozenset(event.refereed)
    for row in event.drawn:
        assert row not in evidence.checked and 0 <= row < evidence.rows, "a row is drawn once"
        due = row in refereed
        evidence.checked[row] = CheckedRow(Stand.REFEREE_DUE if due else Stand.AUDIT_DUE)
        if due:
            verification.referee_due[EvidenceRow(event.lease_id, row)] = None
        else:
            verification.wait_for_audit(event.worker_id, EvidenceRow(event.lease_id, row))
    evidence.open_rows += len(event.drawn)
    verification.open_rows += len(event.drawn)
    _count(state, verification.job_id, rows_drawn=len(event.drawn))
    _look_for_release(verification, evidence.worker_id)


def _evidence(state: State, job: Job, event: v.AuditsDrawn, at_ms: int) -> Evidence:
    ended = state.ended_leases[event.lease_id]
    facts = ended.commitment
    assert facts is not None and ended.outcome is None, "evidence is of a settled lease"
    worker = state.workers[ended.worker_id]
    assert event.worker_id == ended.worker_id, "a lease is its worker's"
    if worker.record_class != event.execution_class:
        # Other numerics are another reason to be wrong: half of what was shown still counts.
        worker.rows_verified //= 2 if worker.record_class else 1
        worker.record_class = event.execution_class
    worker.rows_unverified += event.rows
    state.accounts[worker.account_id].microcredits_unverified += event.microcredits
    return Evidence(
        lease_id=event.lease_id,
        worker_id=event.worker_id,
        cursor=event.cursor,
        spans=tuple((span.job_position, span.job_position + span.rows) for span in job.results[event.cursor - 1].spans),
        rows=event.rows,
        output=facts.output,
        inline=facts.inline,
        commitment=facts.message_digest,
        execution_class=event.execution_class,
        microcredits=event.microcredits,
        failed_rows=frozenset(failure.row for failure in facts.failures),
        rows_failed=facts.rows_failed,
        settled_at_ms=at_ms,
        further_rows=event.further_rows,
    )


# ------------------------------------------------------------------------------------------------- tasks that check


def begin_check(state: State, task: Task) -> None:
    """A task was made that audits these rows, or has a referee decide about them."""
    assert task.job_id is not None and len(task.checks) == task.rows, "a task checks as many rows as it has"
    verification = state.verifications[task.job_id]
    stand = Stand.AUDITED
    if task.kind is TaskKind.REFEREE:
        stand = Stand.REFEREED
        verification.refereed[task.task_id] = tuple(
            Disputed(row, verification.evidences[row.lease_id].checked[row.row].differing) for row in task.checks
        )
    else:
        owners = (verification.evidences[row.lease_id].worker_id for row in task.checks)
        verification.audits[task.task_id] = Audit(task.task_id, task.checks, dict.fromkeys(owners))
    for row in task.checks:
        evidence = verification.evidences[row.lease_id]
        verification.wait_no_more(evidence.worker_id, row)
        checked = evidence.checked[row.row]
        assert checked.task_id is None and checked.stand in OPEN_STANDS, "one task at a time checks a row"
        checked.stand, checked.task_id = stand, task.task_id


def begin_redo(state: State, task: Task) -> None:
    """A task was made that does withdrawn rows again."""
    assert task.job_id is not None, "rows are a job's"
    redo = state.verifications[task.job_id].redo
    for start, end in task.spans:
        assert redo.pop(start, None) == (end, task.corrects), "what is done again was withdrawn"


def give_back(state: State, task: Task) -> None:
    """A task that checks rows is gone and checked nothing: they wait again."""
    verification = state.verifications.get(task.job_id) if task.job_id is not None else None
    if verification is None:
        return
    referees = task.kind is TaskKind.REFEREE
    if referees:
        verification.refereed.pop(task.task_id, None)
    else:
        verification.audits.pop(task.task_id, None)
    for row in task.checks:
        checked = verification.checked_by(row, task.task_id)
        if checked is None:
            continue
        checked.task_id = None
        if referees:
            checked.stand = Stand.REFEREE_DUE
            verification.referee_due[row] = None
        else:
            checked.stand = Stand.AUDIT_DUE
            verification.wait_for_audit(verification.evidences[row.lease_id].worker_id, row)


def end_audit(state: State, task: Task, lease: Lease, facts: CommitmentFacts, *, microcredits: int) -> None:
    """An audit has settled: its rows are to be compared. `microcredits` is its pay as far as that is pending."""
    assert task.job_id is not None, "audits are a job's"
    verification = state.verifications[task.job_id]
    audit = verification.audits[task.task_id]
    audit.lease_id, audit.worker_id = lease.lease_id, lease.worker_id
    audit.output, audit.inline, audit.execution_class = facts.output, facts.inline, facts.execution_class
    audit.microcredits = microcredits
    verification.audit_of[lease.lease_id] = task.task_id
    state.accounts[state.workers[lease.worker_id].account_id].microcredits_unverified += microcredits


# ------------------------------------------------------------------------------------------------- what was found


def _compare(state: State, event: v.AuditCompared) -> None:
    verification = state.verifications[event.job_id]
    audit = verification.audits[event.task_id]
    assert audit.lease_id == event.lease_id and not audit.compared, "an audit is compared once"
    audit.compared = True
    for index, (row, equal) in enumerate(zip(audit.checks, event.equal, strict=True)):
        checked = verification.checked_by(row, event.task_id)
        if checked is None:
            continue
        checked.task_id = None
        if equal:
            _pass(state, verification, verification.evidences[row.lease_id], checked)
        else:
            checked.stand = Stand.REFEREE_DUE
            checked.differing = EvidenceRow(event.lease_id, index)
            verification.referee_due[row] = None
            audit.disputed[index] = None
    if not audit.disputed:
        verification.audits_done[event.task_id] = None


def _give_up(verification: Verification, event: v.AuditGivenUp) -> None:
    for row in event.rows:
        evidence = verification.evidences[row.lease_id]
        verification.wait_no_more(evidence.worker_id, row)
        checked = evidence.checked[row.row]
        checked.stand, checked.task_id = Stand.REFEREE_DUE, None
        verification.referee_due[row] = None


def _report(verification: Verification, event: v.RefereeReported) -> None:
    """Every row waits again; the verdicts that follow decide those that are decided."""
    disputed = verification.refereed.pop(event.task_id)
    for row, found in zip(disputed, event.findings, strict=True):
        checked = verification.checked_by(row.checks, event.task_id)
        if checked is None:
            continue
        checked.stand, checked.task_id = Stand.REFEREE_DUE, None
        checked.ties += found.candidates[0].finding is Finding.TIE
        verification.referee_due[row.checks] = None


def _pass(state: State, verification: Verification, evidence: Evidence, checked: CheckedRow) -> None:
    checked.stand = Stand.PASSED
    evidence.passed += 1
    evidence.open_rows -= 1
    verification.open_rows -= 1
    _count(state, verification.job_id, rows_passed=1)
    verification.shares[evidence.worker_id].passed += 1
    state.workers[evidence.worker_id].rows_verified += 1
    _look_for_release(verification, evidence.worker_id)


def _look_for_release(verification: Verification, worker_id: PartyId) -> None:
    """Says again whether the oldest evidence of a worker can be released: they go in order."""
    share = verification.shares.get(worker_id)
    if share is None:
        return
    oldest = verification.evidences[next(iter(share.leases))]
    if not oldest.open_rows and share.passed - oldest.passed >= oldest.further_rows:
        verification.releasable[oldest.lease_id] = None
    else:
        verification.releasable.pop(oldest.lease_id, None)


def _settle_dispute(verification: Verification, checked: CheckedRow) -> None:
    """The row is decided, or nobody asks any more: the audit that gave another one may be done."""
    audit_id = verification.audit_of.get(checked.differing.lease_id) if checked.differing is not None else None
    if audit_id is None or checked.differing is None:
        return
    audit = verification.audits[audit_id]
    audit.disputed.pop(checked.differing.row, None)
    if audit.compared and not audit.disputed:
        verification.audits_done[audit_id] = None


def _judge(state: State, event: v.VerdictReached) -> None:
    verification = state.verifications[event.job_id]
    if event.verdict is Verdict.AUDITOR_WRONG:
        return
    row = EvidenceRow(event.lease_id, event.row)
    evidence = verification.evidences[event.lease_id]
    checked = evidence.checked[event.row]
    assert checked.stand is Stand.REFEREE_DUE, "a verdict is of a row that waits for one"
    del verification.referee_due[row]
    _settle_dispute(verification, checked)
    if event.verdict is Verdict.UPHELD:
        checked.by_referee = True
        _count(state, verification.job_id, rows_by_referee=1)
        _pass(state, verification, evidence, checked)
        return
    evidence.open_rows -= 1
    verification.open_rows -= 1
    if event.verdict is Verdict.TIE:
        checked.stand = Stand.TIED
        _count(state, verification.job_id, rows_tied=1)
    else:
        checked.stand = Stand.WITHDRAWN
        _count(state, verification.job_id, rows_wrong=int(event.verdict is Verdict.PROVEN_WRONG))
    _look_for_release(verification, evidence.worker_id)


# ------------------------------------------------------------------------------------------------- what follows


def _correct(state: State, event: v.RowsCorrected) -> None:
    verification = state.verifications[event.job_id]
    job = state.jobs[event.job_id]
    for start, end in event.spans:
        assert job.done.covers(start, end), "what is withdrawn was delivered"
        job.done = job.done.subtract(start, end)
        verification.redo[start] = (end, event.cursor)
        _count(state, verification.job_id, rows_withdrawn=end - start)
        if event.verdict not in ANNULLING:
            for position in range(start, end):
                verification.redone[position] = verification.redone.get(position, 0) + 1
    job.rows_failed -= event.rows_failed
    evidence = verification.evidences[event.lease_id]
    evidence.rows_failed -= event.rows_failed
    if event.verdict is Verdict.UNEXPLAINED:
        verification.strangers[evidence.worker_id] = evidence.execution_class
    if event.verdict in ANNULLING:
        _forget(state, verification, evidence)


def _forget(state: State, verification: Verification, evidence: Evidence) -> None:
    """An evidence goes, whatever of it is still open."""
    for number, checked in evidence.checked.items():
        if checked.stand in OPEN_STANDS:
            verification.wait_no_more(evidence.worker_id, EvidenceRow(evidence.lease_id, number))
            _settle_dispute(verification, checked)
    verification.open_rows -= evidence.open_rows
    worker = state.workers[evidence.worker_id]
    worker.rows_unverified -= evidence.rows
    state.accounts[worker.account_id].microcredits_unverified -= evidence.microcredits
    del verification.evidences[evidence.lease_id]
    verification.releasable.pop(evidence.lease_id, None)
    share = verification.shares[evidence.worker_id]
    share.passed -= evidence.passed
    del share.leases[evidence.lease_id]
    if share.leases:
        _look_for_release(verification, evidence.worker_id)
    else:
        del verification.shares[evidence.worker_id]


def _release(state: State, event: v.EvidenceReleased) -> None:
    verification = state.verifications[event.job_id]
    audit_id = verification.audit_of.pop(event.lease_id, None)
    if audit_id is not None:
        audit = verification.audits.pop(audit_id)
        verification.audits_done.pop(audit_id, None)
        assert audit.microcredits == event.microcredits, "what is released is what was pending"
        state.accounts[event.account_id].microcredits_unverified -= audit.microcredits
        return
    evidence = verification.evidences[event.lease_id]
    assert evidence.microcredits == event.microcredits, "what is released is what was pending"
    job = state.jobs[event.job_id]
    status = ACCEPTED if event.accepted else VERIFIED
    job.results[evidence.cursor - 1] = replace(job.results[evidence.cursor - 1], status=status)
    _forget(state, verification, evidence)


def _void(state: State, event: v.PayVoided) -> None:
    """The worker's evidences and audits of this job are worth nothing from here on."""
    verification = state.verifications[event.job_id]
    account = state.accounts[event.account_id]
    voided = 0
    share = verification.shares.get(event.worker_id)
    for lease_id in share.leases if share is not None else ():
        evidence = verification.evidences[lease_id]
        voided += evidence.microcredits
        evidence.microcredits = 0
    for audit in verification.audits.values():
        if audit.worker_id == event.worker_id:
            voided += audit.microcredits
            audit.microcredits = 0
    assert voided == event.microcredits, "what is voided is what was pending"
    account.microcredits_unverified -= voided
    state.jobs[event.job_id].microcredits -= voided


def end_verification(state: State, job: Job) -> None:
    """The job has ended: nothing of it is checked any more, and what is pending is the operator's to release."""
    verification = state.verifications.pop(job.job_id, None)
    if verification is None:
        return
    for evidence in verification.evidences.values():
        worker = state.workers[evidence.worker_id]
        worker.rows_unverified -= evidence.rows
        state.accounts[worker.account_id].microcredits_unverified -= evidence.microcredits
    for audit in verification.audits.values():
        if audit.worker_id is not None:
            account_id = state.workers[audit.worker_id].account_id
            state.accounts[account_id].microcredits_unverified -= audit.microcredits
