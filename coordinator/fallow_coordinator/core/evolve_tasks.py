"""How events about tasks and leases change the state."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import assert_never

from fallow.credits import PoolMode
from fallow.ids import AccountId, LeaseId
from fallow.job import PROVISIONAL, JobRowFailure, RowSpan, TaskResult
from fallow.limits import ROW_FAILURES_LISTED_PER_TASK_MAX
from fallow.session import Cause, NodeRows, RowFailure, TaskKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core.evolve_sessions import end_grace_if_empty
from fallow_coordinator.core.evolve_verification import begin_check, begin_redo, end_audit, give_back
from fallow_coordinator.core.groups import hold, learns_speed
from fallow_coordinator.core.health import recovers
from fallow_coordinator.core.holders import forget_bundle, takes_bundle
from fallow_coordinator.core.lanes import enter_lane, lane_of, leave_lane, leave_queue, move_share, release_lane
from fallow_coordinator.core.learning import inspected_unit_micros
from fallow_coordinator.core.limits import (
    LEASES_REMEMBERED_MAX,
    RETRY_DELAY_MS_MAX,
    RETRY_DELAY_MS_MIN,
    TRANSFER_BYTES_PER_MS_MIN,
    UPLOAD_MS_MIN,
)
from fallow_coordinator.core.needs import ANY_POOL, Needs
from fallow_coordinator.core.state import (
    NO_DIGEST,
    Answer,
    CommitmentFacts,
    EndedLease,
    Job,
    Lease,
    State,
    Task,
    TaskPhase,
)

TaskEvent = (
    e.TaskCreated
    | e.PackRequested
    | e.TaskInputPacked
    | e.PackingFailed
    | e.LeaseGranted
    | e.LeaseEnded
    | e.CommitmentRecorded
    | e.TaskSettled
    | e.LateLeaseSettled
    | e.TaskAbandoned
    | e.TaskDropped
)

MEASURING_KINDS = frozenset({TaskKind.CHALLENGE, TaskKind.CHECK})
"""Tasks that live exactly as long as their lease, and belong to no job and no bundle."""
UNPACKED_KINDS = MEASURING_KINDS | {TaskKind.INSPECT}
"""Tasks that are leased without rows packed for them."""
BLAMELESS = frozenset({e.LeaseOutcome.EXPIRED, e.LeaseOutcome.LOST, e.LeaseOutcome.REVOKED})
"""Outcomes that count as losses, not as failed attempts."""


def evolve_task(state: State, event: TaskEvent, at_ms: int) -> None:
    """Applies one event about a task or its leases."""
    match event:
        case e.TaskCreated():
            _create(state, event)
        case e.PackRequested():
            task = state.tasks[event.task_id]
            assert event.pack_number == task.pack_number + 1, "packings are counted"
            _leave_phase(state, task)
            task.pack_number = event.pack_number
            task.pack_requested_at_ms = at_ms
            task.phase = TaskPhase.PACKING
            enter_lane(state, task)
        case e.TaskInputPacked():
            task = state.tasks[event.task_id]
            assert task.phase is TaskPhase.PACKING and event.pack_number == task.pack_number, (
                "the newest packing counts"
            )
            _leave_phase(state, task)
            task.pack_failures = 0
            task.input, task.input_inline = event.input, event.inline
            task.candidates, task.execution_classes = event.candidates, event.execution_classes
            task.phase = TaskPhase.READY
            enter_lane(state, task)
        case e.PackingFailed():
            task = state.tasks[event.task_id]
            assert task.phase is TaskPhase.PACKING and event.pack_number == task.pack_number, (
                "the newest packing counts"
            )
            task.pack_failures += 1
            task.last_cause, task.last_reason = Cause.PLATFORM, event.reason
            _wait(state, task, event.retry_at_ms)
        case e.LeaseGranted():
            _grant(state, event, at_ms)
        case e.LeaseEnded():
            _end(state, event, at_ms)
        case e.CommitmentRecorded():
            _commit(state, event, at_ms)
        case e.TaskSettled():
            _settle(state, event, at_ms)
        case e.LateLeaseSettled():
            _settle_late(state, event, at_ms)
        case e.TaskAbandoned():
            _abandon(state, event)
        case e.TaskDropped():
            task = state.tasks[event.task_id]
            _remove(state, task)
            if task.challenge_task_id is not None:
                state.challenges[task.challenge_task_id].checks += 1
            elif task.checks:
                give_back(state, task)
        case _:
            assert_never(event)


def lane_of_task(event: e.TaskCreated, job: Job | None) -> Needs:
    """Where the task queues."""
    return job.lane if job is not None and event.kind is TaskKind.MAP else Needs(event.kind, ANY_POOL, None)


def _create(state: State, event: e.TaskCreated) -> None:
    assert event.task_id not in state.tasks, "a task is created once"
    job = state.jobs[event.job_id] if event.job_id is not None else None
    state.tasks_created += 1
    task = state.tasks[event.task_id] = Task(
        task_id=event.task_id,
        number=state.tasks_created,
        kind=event.kind,
        job_id=event.job_id,
        bundle_digest=event.bundle_digest,
        pool_id=event.pool_id,
        lane=lane_of_task(event, job),
        spans=event.spans,
        # A challenge is answered by one row; only jobs have spans.
        rows=1 if event.kind is TaskKind.CHALLENGE else sum(end - start for start, end in event.spans),
        unit_micros=event.unit_micros,
        phase=TaskPhase.WAITING,
        challenge_task_id=event.challenge_task_id,
        checks=event.checks,
        corrects=event.corrects,
    )
    lane = lane_of(state, task.lane)
    if job is None:
        assert event.kind in UNPACKED_KINDS, "work of no job is an inspection, a challenge or its check"
        lane.jobs += 1
        if event.kind is TaskKind.INSPECT:
            state.bundles[task.bundle_digest].inspection_task_id = task.task_id
        elif event.challenge_task_id is not None:
            challenge = state.challenges[event.challenge_task_id]
            assert challenge.check_task_id is None, "an answer is checked by one worker at a time"
            challenge.check_task_id = task.task_id
    else:
        if task.checks:
            begin_check(state, task)
        elif task.corrects:
            begin_redo(state, task)
        else:
            _cut(job, task)
        lane.jobs += task.kind is TaskKind.REFEREE
        job.tasks[task.task_id] = None
        job.tasks_created += 1
        account = state.accounts[job.account_id]
        task.stamp = account.share_key
        if event.share_key:
            move_share(state, account, event.share_key)
        if job.next_row == job.rows and not (task.checks or task.corrects):
            leave_queue(state, job)
    enter_lane(state, task)


def _cut(job: Job, task: Task) -> None:
    for start, end in task.spans:
        assert start == job.next_row < end <= job.rows, "rows are cut in order, each once"
        job.next_row = end


def _leave_phase(state: State, task: Task) -> None:
    """Takes a task out of the index of its phase."""
    assert task.phase is not TaskPhase.LEASED or task.lease_id is None, "a leased task is let go by its lease"
    if task.phase is not TaskPhase.ANSWERED:
        leave_lane(state, task)


def _wait(state: State, task: Task, not_before_ms: int) -> None:
    _leave_phase(state, task)
    task.phase = TaskPhase.WAITING
    task.not_before_ms = not_before_ms
    enter_lane(state, task)


def _grant(state: State, event: e.LeaseGranted, at_ms: int) -> None:
    task = state.tasks[event.task_id]
    worker = state.workers[event.worker_id]
    assert event.lease_id not in state.leases and event.lease_id not in state.ended_leases, "a lease is granted once"
    assert event.fence == task.fence + 1, "a fence only grows, one by one"
    assert worker.session_id == event.session_id and worker.free > 0, "a lease goes to a free, open session"
    if event.duplicate:
        _double(state, task, event)
    else:
        assert task.phase is (TaskPhase.WAITING if task.kind in UNPACKED_KINDS else TaskPhase.READY), "it can be leased"
        _leave_phase(state, task)
        task.phase = TaskPhase.LEASED
        task.lease_id = event.lease_id
    task.fence = event.fence
    state.leases[event.lease_id] = Lease(
        lease_id=event.lease_id,
        task_id=event.task_id,
        worker_id=event.worker_id,
        session_id=event.session_id,
        fence=event.fence,
        granted_at_ms=at_ms,
        deadline_ms=event.deadline_ms,
        runtime_max_ms=event.runtime_max_ms,
        price_microcredits_per_unit=event.price_microcredits_per_unit,
        reserved_microcredits=event.reserved_microcredits,
    )
    insort(state.deadlines, (event.deadline_ms, event.lease_id))
    hold(state, worker, lease_id=event.lease_id, unit_micros=task.unit_micros, holds=True)
    worker.free_since_ms = 0
    if task.job_id is not None:
        job = state.jobs[task.job_id]
        job.rows_leased += 0 if event.duplicate else task.rows
        job.reserved_microcredits += event.reserved_microcredits
    if task.kind is TaskKind.MAP:
        takes_bundle(state, worker, task.bundle_digest)
    if task.kind is TaskKind.INSPECT:
        state.accounts[submitter_of(state, task)].inspected_last = state.sequence


def _double(state: State, task: Task, event: e.LeaseGranted) -> None:
    """Gives a task that is leased its second live lease."""
    assert task.phase is TaskPhase.LEASED and task.lease_id is not None, "a duplicate is of a task that is leased"
    assert task.duplicate_id is None and task.job_id is not None, "rows of jobs are leased twice at most"
    assert state.leases[task.lease_id].worker_id != event.worker_id, "a duplicate goes to another worker"
    task.duplicate_id = event.lease_id
    task.duplicates += 1
    state.duplicated[task.task_id] = None
    job = state.jobs[task.job_id]
    job.duplicates += 1
    if event.share_key:
        move_share(state, state.accounts[job.account_id], event.share_key)


def submitter_of(state: State, task: Task) -> AccountId:
    """The account on whose behalf a bundle is inspected: who registered it first."""
    return next(iter(state.bundles[task.bundle_digest].owners))


def _commit(state: State, event: e.CommitmentRecorded, at_ms: int) -> None:
    lease = state.leases[event.lease_id]
    assert lease.commitment is None, "a lease commits once"
    verifies = bool(state.verifications) and state.tasks[lease.task_id].job_id in state.verifications
    lease.commitment = CommitmentFacts(
        output_root=event.output_root,
        rows=event.rows,
        output=event.output,
        inline=event.inline,
        failures=event.failures,
        rows_failed=event.rows_failed,
        node=event.usage.node,
        wall_us=event.usage.wall_microseconds,
        millijoules=event.millijoules,
        energy_measured=event.energy_measured,
        message_digest=event.message_digest if verifies else NO_DIGEST,
        nodes=event.usage.nodes,
        execution_class=event.execution_class,
    )
    if event.inline:
        return
    upload_until_ms = at_ms + UPLOAD_MS_MIN + event.output.length_bytes // TRANSFER_BYTES_PER_MS_MIN
    if upload_until_ms > lease.deadline_ms:
        move_deadline(state, lease, upload_until_ms)


def move_deadline(state: State, lease: Lease, deadline_ms: int) -> None:
    """The lease ends by itself at another moment."""
    _forget_deadline(state, lease)
    lease.deadline_ms = deadline_ms
    insort(state.deadlines, (deadline_ms, lease.lease_id))


def _forget_deadline(state: State, lease: Lease) -> None:
    entry = (lease.deadline_ms, lease.lease_id)
    index = bisect_left(state.deadlines, entry)
    assert state.deadlines[index] == entry, "a live lease has a deadline"
    del state.deadlines[index]


def _release(state: State, lease_id: LeaseId, outcome: e.LeaseOutcome | None) -> Task:
    """Takes a lease off its worker and its task, and remembers it; gives the task.

    What is left of two leases becomes the task's one.
    """
    lease = state.leases.pop(lease_id)
    task = state.tasks[lease.task_id]
    assert lease_id in task.lease_ids and lease.fence <= task.fence, "a live lease is its task's"
    other_id = task.other_lease_id(lease_id)
    task.lease_id, task.duplicate_id = other_id, None
    if outcome is not None or other_id is None:
        state.duplicated.pop(task.task_id, None)
    _forget_deadline(state, lease)
    worker = state.workers[lease.worker_id]
    hold(state, worker, lease_id=lease_id, unit_micros=task.unit_micros, holds=False)
    if worker.session_id is not None and not worker.leases:
        worker.free_since_ms = state.clock_ms
    end_grace_if_empty(state, worker)
    if task.job_id is not None:
        job = state.jobs[task.job_id]
        if task.phase is TaskPhase.LEASED and (other_id is None or outcome is None):
            job.rows_leased -= task.rows
        job.reserved_microcredits -= lease.reserved_microcredits
    state.ended_leases[lease_id] = EndedLease(
        lease.task_id,
        task.job_id,
        lease.worker_id,
        lease.fence,
        outcome,
        lease.commitment,
        task.input.digest if task.input is not None and not task.input_inline and other_id is None else None,
        tuple(one.block.digest for one in task.candidates if not one.inline) if task.candidates else (),
        late=outcome is None and task.answer is not None,
    )
    state.ended_order.append(lease_id)
    if len(state.ended_order) > LEASES_REMEMBERED_MAX:
        del state.ended_leases[state.ended_order.popleft()]
    return task


def counts_as_attempt(outcome: e.LeaseOutcome, cause: Cause) -> bool:
    """Whether an end was somebody's fault; else it is a loss."""
    return outcome not in BLAMELESS and cause is not Cause.OWNER_PREEMPT


def retry_delay_ms(attempts: int) -> int:
    """How long a task rests after its n-th failed attempt."""
    return min(RETRY_DELAY_MS_MAX, RETRY_DELAY_MS_MIN << min(attempts, 16) >> 1)


def _end(state: State, event: e.LeaseEnded, at_ms: int) -> None:
    worker_id = state.leases[event.lease_id].worker_id
    task = _release(state, event.lease_id, event.outcome)
    if event.outcome is e.LeaseOutcome.FAILED:
        forget_bundle(state, state.workers[worker_id], task.bundle_digest)
    if task.answer is not None:
        _remove(state, task)
        return
    task.last_cause, task.last_reason = event.cause, event.reason
    if task.lease_id is not None:
        # The other lease goes on: nothing is tried again, and nothing is counted as a try.
        if event.outcome not in (e.LeaseOutcome.LOST, e.LeaseOutcome.REVOKED):
            task.avoid[worker_id] = None
        return
    if task.kind is not TaskKind.INSPECT:
        # The rows of an inspection are not packed anew for each try.
        task.input, task.input_inline, task.candidates, task.execution_classes = None, False, (), ()
    not_before_ms = at_ms
    if counts_as_attempt(event.outcome, event.cause):
        task.attempts += 1
        not_before_ms = at_ms + retry_delay_ms(task.attempts)
    else:
        task.losses += 1
        if event.outcome not in BLAMELESS:
            # Given back because its owner came: the same worker may be free again only after a while.
            not_before_ms = at_ms + retry_delay_ms(task.losses)
    if event.outcome not in (e.LeaseOutcome.LOST, e.LeaseOutcome.REVOKED):
        task.avoid[worker_id] = None
    _wait(state, task, not_before_ms)


def _remove(state: State, task: Task) -> None:
    """A task leaves the state; its phase's index too."""
    _leave_phase(state, task)
    del state.tasks[task.task_id]
    if task.answer is not None:
        _forget_late(state, task)
    elif task.job_id is not None:
        del state.jobs[task.job_id].tasks[task.task_id]
        if task.kind is TaskKind.REFEREE:
            release_lane(state, task.lane)
    else:
        if task.kind is TaskKind.INSPECT:
            state.bundles[task.bundle_digest].inspection_task_id = None
        elif task.challenge_task_id is not None:
            state.challenges[task.challenge_task_id].check_task_id = None
        release_lane(state, task.lane)


def _settle(state: State, event: e.TaskSettled, at_ms: int) -> None:
    lease = state.leases[event.lease_id]
    commitment = lease.commitment
    worker = state.workers[lease.worker_id]
    learns_speed(state, worker, state.tasks[lease.task_id].bundle_digest, event.speed_milliunits_per_s)
    _learn_cost(state, state.tasks[lease.task_id], event.worked_unit_micros)
    task = _release(state, event.lease_id, None)
    assert task.task_id == event.task_id, "a lease settles its own task"
    if task.lease_id is None:
        _remove(state, task)
    else:
        assert commitment is not None, "what settles was committed"
        _keep_late(state, task, Answer(event.lease_id, commitment.output_root, commitment.execution_class))
    if task.kind is TaskKind.CHALLENGE:
        assert commitment is not None, "what settles was committed"
        challenge = state.challenges[task.task_id]
        challenge.output, challenge.output_inline = commitment.output, commitment.inline
    if task.kind in MEASURING_KINDS:
        return
    worker.tasks_settled += 1
    worker.settled_at_ms = at_ms
    recovers(state, worker)
    worker.rows_settled += event.rows - event.rows_failed
    worker.footprint = worker.footprint.plus(event.footprint)
    if task.job_id is None or task.kind is TaskKind.REFEREE:
        return
    assert commitment is not None, "what settles was committed"
    assert commitment.rows == event.rows == task.rows, "every row of the task is delivered"
    job = state.jobs[task.job_id]
    if task.checks:
        job.microcredits += event.microcredits
        pending_pay = 0 if event.released or job.mode is not PoolMode.MARKET else event.microcredits
        end_audit(state, task, lease, commitment, microcredits=pending_pay)
        return
    outputs = state.accounts[job.account_id].outputs
    length_bytes, results = outputs.get(commitment.output.digest, (commitment.output.length_bytes, 0))
    outputs[commitment.output.digest] = (length_bytes, results + 1)
    _deliver(
        job,
        task,
        event.rows_failed,
        TaskResult(
            cursor=event.cursor,
            spans=row_spans(task.spans),
            output=commitment.output,
            failures=job_failures(task.spans, commitment.failures),
            worker_id=lease.worker_id,
            node=commitment.node,
            output_root=commitment.output_root,
            status=PROVISIONAL if job.job_id in state.verifications else job.policy,
            corrects=task.corrects,
            footprint=event.footprint,
            nodes=commitment.nodes,
        ),
    )
    job.tasks_settled += 1
    job.footprint = job.footprint.plus(event.footprint)
    account = state.accounts[job.account_id]
    account.footprint = account.footprint.plus(event.footprint)
    job.microcredits += event.microcredits


def _keep_late(state: State, task: Task, answer: Answer) -> None:
    """The task's rows are delivered and a lease of it is still out: it stays until that one is over."""
    assert task.job_id is not None, "only rows of jobs are leased twice"
    job = state.jobs[task.job_id]
    task.phase, task.answer = TaskPhase.ANSWERED, answer
    del job.tasks[task.task_id]
    job.late[task.task_id] = None


def _forget_late(state: State, task: Task) -> None:
    assert task.job_id is not None, "only rows of jobs are leased twice"
    job = state.jobs[task.job_id]
    del job.late[task.task_id]
    if not job.late and state.finished.pop(job.job_id, None) is not None:
        # What is done after a job's end is to be in the views too before it leaves.
        state.finished[job.job_id] = state.sequence


def _settle_late(state: State, event: e.LateLeaseSettled, at_ms: int) -> None:
    """A lease committed to rows that another one has delivered: its worker did the work, the job gets nothing new."""
    lease = state.leases[event.lease_id]
    worker = state.workers[lease.worker_id]
    assert lease.commitment is not None, "what settles was committed"
    learns_speed(state, worker, state.tasks[lease.task_id].bundle_digest, event.speed_milliunits_per_s)
    task = _release(state, event.lease_id, None)
    assert task.answer is not None and task.answer.lease_id == event.delivered_lease_id, "its rows are delivered"
    assert task.task_id == event.task_id and task.job_id is not None, "a lease settles its own task"
    _remove(state, task)
    worker.tasks_settled += 1
    worker.settled_at_ms = at_ms
    recovers(state, worker)
    worker.rows_settled += event.rows - event.rows_failed
    worker.footprint = worker.footprint.plus(event.footprint)
    job = state.jobs[task.job_id]
    job.footprint = job.footprint.plus(event.footprint)
    job.late_footprint = job.late_footprint.plus(event.footprint)
    account = state.accounts[job.account_id]
    account.footprint = account.footprint.plus(event.footprint)
    job.microcredits += event.microcredits


def _learn_cost(state: State, task: Task, worked_unit_micros: int) -> None:
    """Counts a task whose work a measured device has told."""
    if not worked_unit_micros or task.job_id is None:
        return
    bundle = state.bundles[task.bundle_digest]
    bundle.learning_tasks += 1
    bundle.learning_inspected += inspected_unit_micros(state.jobs[task.job_id], task)
    bundle.learning_worked += worked_unit_micros


def _abandon(state: State, event: e.TaskAbandoned) -> None:
    task = state.tasks[event.task_id]
    assert task.lease_id is None, "an abandoned task is not leased"
    _remove(state, task)
    if task.job_id is None:
        state.bundles[task.bundle_digest].obstacle = event.reason
        return
    job = state.jobs[task.job_id]
    listed = min(task.rows, ROW_FAILURES_LISTED_PER_TASK_MAX)
    failures = tuple(RowFailure(row, event.cause, event.reason) for row in range(listed))
    _deliver(
        job,
        task,
        event.rows,
        TaskResult(
            cursor=event.cursor,
            spans=row_spans(task.spans),
            output=None,
            failures=job_failures(task.spans, failures),
            worker_id="",
            node=0,
            output_root=None,
            status=job.policy,
            corrects=task.corrects,
        ),
    )


def _deliver(job: Job, task: Task, rows_failed: int, result: TaskResult) -> None:
    assert result.cursor == len(job.results) + 1, "results are counted"
    for start, end in task.spans:
        assert not job.done.overlaps(start, end), "each row is delivered once"
        job.done = job.done.add(start, end)
    job.rows_failed += rows_failed
    job.results.append(result)
    if result.worker_id:
        for run in result.nodes or (NodeRows(result.node, task.rows),):
            key = (result.worker_id, run.node)
            job.shares[key] = job.shares.get(key, 0) + run.rows


def row_spans(spans: tuple[tuple[int, int], ...]) -> tuple[RowSpan, ...]:
    """Where the job positions of a task lie in its block."""
    block_row = 0
    made: list[RowSpan] = []
    for start, end in spans:
        made.append(RowSpan(job_position=start, block_row=block_row, rows=end - start))
        block_row += end - start
    return tuple(made)


def job_failures(spans: tuple[tuple[int, int], ...], failures: tuple[RowFailure, ...]) -> tuple[JobRowFailure, ...]:
    """Failures of a block's rows, by job position."""
    if not failures:
        return ()
    made: list[JobRowFailure] = []
    for failure in failures:
        row = failure.row
        for start, end in spans:
            if row < end - start:
                made.append(JobRowFailure(start + row, failure.cause, failure.reason))
                break
            row -= end - start
    return tuple(made)
