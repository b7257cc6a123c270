"""Checks of rows and rows that are done again: which start now, and which workers may have them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import islice

from fallow.ids import LeaseId, PartyId, TaskId
from fallow.limits import BLOCK_BYTES_MAX, INLINE_PAYLOAD_BYTES_MAX, REFEREE_ROWS_MAX
from fallow.roles import Tier
from fallow.session import TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.cutting import Layout, cost_of, unit_micros
from fallow_coordinator.core.evidence import Verification
from fallow_coordinator.core.groups import numbers_in
from fallow_coordinator.core.limits import (
    AUDIT_PATIENCE_MS,
    AUDIT_ROWS_MAX,
    AUDITORS_LOOKED_AT_MAX,
    AUDITS_LIVE_MAX,
    REFEREES_LIVE_MAX,
    TASK_BLOCKS_MAX,
    TASK_UNIT_MICROS_MAX,
    TASK_UNITS_TARGET,
    UNIT_MICROS,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.needs import REFEREEING, misfit
from fallow_coordinator.core.shares import share_key_after
from fallow_coordinator.core.state import Job, Lane, State, Task, TaskPhase, Worker
from fallow_coordinator.core.verification_events import EvidenceRow

_OUTPUT_ROW_OVERHEAD_BYTES = 64


# ------------------------------------------------------------------------------------------------- what can start


def redo(state: State, job: Job, verification: Verification, names: Names) -> tuple[e.Event, ...]:
    """Withdrawn rows of one result go into a task, which is no larger than the one that gave them."""
    if not verification.redo:
        return ()
    cursor = next(iter(verification.redo.values()))[1]
    spans = sorted((start, end) for start, (end, corrects) in verification.redo.items() if corrects == cursor)
    created = _task(state, job, TaskKind.MAP, tuple(spans), names, corrects=cursor)
    return created, e.PackRequested(task_id=created.task_id, pack_number=1)


def audit(state: State, job: Job, verification: Verification, now_ms: int, names: Names) -> tuple[e.Event, ...]:
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


def referee(state: State, job: Job, verification: Verification, names: Names) -> tuple[e.Event, ...]:
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
