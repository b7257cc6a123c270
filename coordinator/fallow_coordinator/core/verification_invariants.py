"""What must hold of verifying jobs after every step."""

from __future__ import annotations

from collections import Counter

from fallow.ids import AccountId, PartyId, TaskId
from fallow.job import JOB_STATES_FINAL, JobState
from fallow.session import TaskKind
from fallow_coordinator.core.evidence import OPEN_STANDS, Evidence, Stand, Verification
from fallow_coordinator.core.ledger import pending
from fallow_coordinator.core.sound import must
from fallow_coordinator.core.state import Job, State
from fallow_coordinator.core.verification_events import EvidenceRow


def check_verifications(state: State) -> None:
    """Raises InvariantError with the first contradiction found."""
    rows: Counter[PartyId] = Counter()
    unpaid: Counter[AccountId] = Counter()
    for job_id, verification in state.verifications.items():
        job = state.jobs[job_id]
        must(job.state not in JOB_STATES_FINAL and bool(job.options.assurance), "what verifies is not finished")
        _check_evidences(state, job, verification)
        _check_tasks(state, job, verification)
        for evidence in verification.evidences.values():
            rows[evidence.worker_id] += evidence.rows
            unpaid[state.workers[evidence.worker_id].account_id] += evidence.microcredits
        for audit in verification.audits.values():
            if audit.worker_id is not None:
                unpaid[state.workers[audit.worker_id].account_id] += audit.microcredits
    for job in state.jobs.values():
        if job.options.assurance and job.state not in JOB_STATES_FINAL:
            must(job.job_id in state.verifications, "a job with an assurance verifies")
        must(job.state is not JobState.VERIFYING or len(job.done) == job.rows, "only whole jobs verify")
    for worker_id, worker in state.workers.items():
        must(worker.rows_unverified == rows[worker_id], "unverified rows are counted")
        must(worker.rows_verified >= 0, "a record is not negative")
    for account_id, account in state.accounts.items():
        must(account.microcredits_unverified == unpaid[account_id], "unverified pay is counted")
        # Invariant 6: what waits for checks cannot have been released.
        waits = state.ledger.balance(pending(account_id))
        must(account.microcredits_unverified <= waits, "unverified pay is pending")


def _check_evidences(state: State, job: Job, verification: Verification) -> None:
    shares = {worker_id: list(share.leases) for worker_id, share in verification.shares.items()}
    found: dict[PartyId, list[str]] = {}
    for lease_id, evidence in verification.evidences.items():
        found.setdefault(evidence.worker_id, []).append(lease_id)
        _check_evidence(job, verification, evidence)
    must(shares == found, "a worker's evidences are known")
    for worker_id, share in verification.shares.items():
        passed = sum(verification.evidences[lease_id].passed for lease_id in share.leases)
        must(share.passed == passed, "rows that stand are counted")
        oldest = verification.evidences[next(iter(share.leases))]
        may_go = not oldest.open_rows and share.passed - oldest.passed >= oldest.further_rows
        must((oldest.lease_id in verification.releasable) == may_go, "what can be released is known")
        must(worker_id in state.workers, "who did rows is known")
    open_rows = sum(evidence.open_rows for evidence in verification.evidences.values())
    must(verification.open_rows == open_rows, "open rows are counted")
    due = {
        (evidence.worker_id, EvidenceRow(evidence.lease_id, row))
        for evidence in verification.evidences.values()
        for row, checked in evidence.checked.items()
        if checked.stand is Stand.AUDIT_DUE
    }
    waiting = [(worker_id, row) for worker_id, rows in verification.audit_due.items() for row in rows]
    must(len(waiting) == len(due) and set(waiting) == due, "rows that wait for an audit are known")
    due_to_referee = {
        EvidenceRow(evidence.lease_id, row)
        for evidence in verification.evidences.values()
        for row, checked in evidence.checked.items()
        if checked.stand is Stand.REFEREE_DUE
    }
    must(set(verification.referee_due) == due_to_referee, "rows that wait for a referee are known")


def _check_evidence(job: Job, verification: Verification, evidence: Evidence) -> None:
    stands = Counter(checked.stand for checked in evidence.checked.values())
    must(evidence.open_rows == sum(stands[stand] for stand in OPEN_STANDS), "open rows are counted")
    must(evidence.passed == stands[Stand.PASSED], "rows that stand are counted")
    must(evidence.rows == sum(end - start for start, end in evidence.spans), "an evidence has its rows")
    must(job.results[evidence.cursor - 1].output == evidence.output, "evidence is of a result")
    withdrawn = {evidence.position_of(row) for row, one in evidence.checked.items() if one.stand is Stand.WITHDRAWN}
    for row, checked in evidence.checked.items():
        must(0 <= row < evidence.rows, "rows that are checked are there")
        held = checked.stand in (Stand.AUDITED, Stand.REFEREED)
        must(held == (checked.task_id is not None), "a row that is being checked knows where")
        position = evidence.position_of(row)
        must(position in withdrawn or position in job.done, "rows that are checked are delivered")


def _check_tasks(state: State, job: Job, verification: Verification) -> None:
    live = {task_id: state.tasks[task_id] for task_id in job.tasks if state.tasks[task_id].checks}
    audits = {task_id for task_id, audit in verification.audits.items() if audit.lease_id is None}
    must(audits == {task_id for task_id, task in live.items() if task.kind is TaskKind.MAP}, "live audits are known")
    referees = {task_id for task_id, task in live.items() if task.kind is TaskKind.REFEREE}
    must(set(verification.refereed) == referees, "live referees' tasks are known")
    done: set[TaskId] = set()
    for task_id, audit in verification.audits.items():
        if audit.lease_id is not None:
            must(verification.audit_of[audit.lease_id] == task_id, "a settled audit is found by its lease")
        if audit.compared and not audit.disputed:
            done.add(task_id)
    must(done == set(verification.audits_done), "audits that are done are known")
    for evidence in verification.evidences.values():
        for row, checked in evidence.checked.items():
            if checked.task_id is not None:
                task_id = checked.task_id
                known = task_id in verification.refereed or task_id in verification.audits
                must(known, f"row {row} of {evidence.lease_id} is being checked somewhere")
    must(sum(end - start for start, (end, _) in verification.redo.items()) <= job.rows, "rows are withdrawn once")
