"""How events about blobs, bundles and jobs change the state."""

from __future__ import annotations

from itertools import accumulate, repeat
from typing import assert_never

from fallow.credits import PoolMode
from fallow.job import JOB_MOVES, JOB_STATES_FINAL, JobState, Objective
from fallow.ranges import RangeSet
from fallow.roles import DataClass
from fallow_coordinator.core import events as e
from fallow_coordinator.core.commands import StoredBlob
from fallow_coordinator.core.cutting import unit_nano_starts
from fallow_coordinator.core.evolve_carbon import forget_deferral
from fallow_coordinator.core.evolve_tasks import move_deadline
from fallow_coordinator.core.evolve_verification import end_verification
from fallow_coordinator.core.lanes import CUTTABLE, join_queue, lane_of, leave_queue, release_lane, wants_cutting
from fallow_coordinator.core.limits import IDEMPOTENCY_MS, LATE_MS_MAX
from fallow_coordinator.core.needs import needs_of_job
from fallow_coordinator.core.parking import park, unpark
from fallow_coordinator.core.state import Account, Bundle, IdempotencyRecord, Job, State

JobEvent = (
    e.BlobRecorded
    | e.BundleRegistered
    | e.BundleInspected
    | e.BundleHeld
    | e.BundleCrashed
    | e.BundleCostLearned
    | e.JobSubmitted
    | e.JobStateChanged
    | e.JobArchived
    | e.JobDeleted
    | e.BlobsForgotten
    | e.BlobQuotaSet
)


def evolve_job(state: State, event: JobEvent, at_ms: int) -> None:
    """Applies one event about blobs, bundles or jobs."""
    match event:
        case e.BlobRecorded():
            _record(state.accounts[event.account_id], event, at_ms)
        case e.BlobsForgotten():
            for account in state.accounts.values():
                for digest in account.blobs.keys() & frozenset(event.digests):
                    account.blob_bytes -= account.blobs.pop(digest).blob.length_bytes
                    del account.blobs_recorded_at_ms[digest]
        case e.BlobQuotaSet():
            state.accounts[event.account_id].blob_bytes_max = event.bytes_max
        case e.BundleRegistered():
            _register(state, event)
        case e.BundleInspected():
            bundle = state.bundles[event.bundle_digest]
            assert bundle.report is None, "a bundle is inspected once"
            assert bundle.inspection_task_id == event.task_id, "the report answers the open inspection"
            bundle.report = event.report
            bundle.obstacle = ""
        case e.BundleHeld():
            state.bundles[event.bundle_digest].held_reason = event.reason
        case e.BundleCostLearned():
            bundle = state.bundles[event.bundle_digest]
            bundle.cost_permille = event.cost_permille
            bundle.learning_tasks = bundle.learning_inspected = bundle.learning_worked = 0
        case e.BundleCrashed():
            state.bundles[event.bundle_digest].crashed_accounts[event.account_id] = None
        case e.JobSubmitted():
            _submit(state, event, at_ms)
        case e.JobStateChanged():
            _move(state, event, at_ms)
        case e.JobArchived():
            _archive(state, event)
        case e.JobDeleted():
            _delete(state, event, at_ms)
        case _:
            assert_never(event)


def _record(account: Account, event: e.BlobRecorded, at_ms: int) -> None:
    digest = event.blob.digest
    known = account.blobs.get(digest)
    account.blob_bytes += event.blob.length_bytes - (known.blob.length_bytes if known is not None else 0)
    account.blobs[digest] = StoredBlob(
        blob=event.blob,
        rows=event.rows,
        root=event.root,
        schema_digest=event.schema_digest,
        size_feature_sums=event.size_feature_sums,
        rows_failed=event.rows_failed,
    )
    account.blobs_recorded_at_ms[digest] = at_ms


def _register(state: State, event: e.BundleRegistered) -> None:
    bundle = state.bundles.get(event.bundle_digest)
    if bundle is None:
        bundle = state.bundles[event.bundle_digest] = Bundle(
            bundle_digest=event.bundle_digest,
            files=event.files,
            input_schema_digest=event.input_schema_digest,
            output_schema_digest=event.output_schema_digest,
            size_feature_count=event.size_feature_count,
            bytes_feature_index=event.bytes_feature_index,
            output_row_bytes=event.output_row_bytes,
        )
    bundle.owners[event.account_id] = None
    state.accounts[event.account_id].bundles[event.bundle_digest] = None


def _submit(state: State, event: e.JobSubmitted, at_ms: int) -> None:
    assert event.job_id not in state.jobs, "a job is submitted once"
    account = state.accounts[event.account_id]
    job = state.jobs[event.job_id] = Job(
        job_id=event.job_id,
        account_id=event.account_id,
        party_id=event.party_id,
        pool_id=event.pool_id,
        bundle_digest=event.bundle_digest,
        blocks=event.blocks,
        row_starts=tuple(accumulate((block.rows for block in event.blocks), initial=0)),
        byte_starts=tuple(accumulate((block.blob.length_bytes for block in event.blocks), initial=0)),
        size_feature_sums=event.size_feature_sums,
        block_size_sums=event.block_size_sums,
        rows=event.rows,
        data_class=DataClass(event.data_class),
        title=event.title,
        options=event.options,
        kept=event.kept,
        policy=event.policy,
        price_microcredits=event.price_microcredits,
        submitted_at_ms=at_ms,
        mode=state.pools[event.pool_id].mode,
        budget_microcredits=_budget(state.pools[event.pool_id].mode, event),
        done=RangeSet(),
        number=state.sequence,
        lane=needs_of_job(
            event.options,
            pool_id=event.pool_id,
            data_class=DataClass(event.data_class),
            mode=state.pools[event.pool_id].mode,
        ),
    )
    assert job.row_starts[-1] == job.rows, "the blocks hold the job's rows"
    if job.options.objective is Objective.CARBON:
        state.carbon_jobs[job.job_id] = None
    account.jobs_unfinished += 1
    account.blocks_unfinished += len(job.blocks)
    state.bundles[event.bundle_digest].jobs[job.job_id] = None
    lane_of(state, job.lane).jobs += 1
    _forget_old_keys(state, at_ms)
    key = (event.account_id, event.idempotency_key)
    assert key not in state.idempotency, "a key makes one job in its time"
    state.idempotency[key] = IdempotencyRecord(event.request_digest, event.job_id, at_ms)
    state.idempotency_order.append(key)
    account.idempotency_keys += 1


def _budget(mode: PoolMode, event: e.JobSubmitted) -> int:
    return event.options.budget_microcredits if mode is PoolMode.QUOTA else event.held_microcredits


def _forget_old_keys(state: State, at_ms: int) -> None:
    while state.idempotency_order:
        key = state.idempotency_order[0]
        if at_ms - state.idempotency[key].at_ms < IDEMPOTENCY_MS:
            return
        state.idempotency_order.popleft()
        del state.idempotency[key]
        state.accounts[key[0]].idempotency_keys -= 1


def _move(state: State, event: e.JobStateChanged, at_ms: int) -> None:
    job = state.jobs[event.job_id]
    assert event.state in JOB_MOVES[job.state], f"no move from {job.state} to {event.state}"
    could_cut, stood = job.state in CUTTABLE, wants_cutting(job)
    job.state, job.reason, job.reason_code = event.state, event.reason, event.reason_code
    if event.state not in CUTTABLE:
        forget_deferral(state, job)
    if event.state in CUTTABLE:
        _set_cost(state, job, event.cost_permille)
    if event.state is JobState.PAUSED:
        if not job.parked:
            park(state, job)
    elif job.parked and not job.deferred_until_ms:
        unpark(state, job)
    if event.due_ms and not could_cut:
        job.due_ms = event.due_ms
    if wants_cutting(job) and not stood:
        join_queue(state, job)
    elif stood and not wants_cutting(job):
        leave_queue(state, job)
    if event.state in JOB_STATES_FINAL:
        assert not job.tasks, "a finished job has no live tasks"
        for task_id in job.late:
            (lease_id,) = state.tasks[task_id].lease_ids
            lease = state.leases[lease_id]
            move_deadline(state, lease, min(lease.deadline_ms, at_ms + LATE_MS_MAX))
        assert event.state is not JobState.SUCCEEDED or len(job.done) == job.rows, "success means every row"
        job.finished_at_ms = at_ms
        state.finished[job.job_id] = state.sequence
        state.carbon_jobs.pop(job.job_id, None)
        account = state.accounts[job.account_id]
        account.jobs_unfinished -= 1
        account.blocks_unfinished -= len(job.blocks)
        del state.bundles[job.bundle_digest].jobs[job.job_id]
        release_lane(state, job.lane)
        end_verification(state, job)


def _set_cost(state: State, job: Job, cost_permille: int) -> None:
    """What the job's blocks cost: by the bundle's curve as it is when the job is first ready, never by a later one."""
    report = state.bundles[job.bundle_digest].report
    job.cost_permille = cost_permille or job.cost_permille
    if report is None or report.cost is None or job.unit_nano_starts:
        return
    curve = report.cost
    if curve.feature_number and not job.block_size_sums:
        return
    sizes = (curve.size_sum(sums) for sums in job.block_size_sums or repeat((), len(job.blocks)))
    starts = unit_nano_starts(curve, (block.rows for block in job.blocks), sizes)
    job.unit_nano_starts = tuple(start * job.cost_permille // 1_000 for start in starts)


def _archive(state: State, event: e.JobArchived) -> None:
    job = state.jobs.pop(event.job_id)
    assert not job.late, "a job leaves when nobody works for it any more"
    state.archived_through = max(state.archived_through, state.finished.pop(event.job_id))
    _let_go_of_outputs(state, job)


def _delete(state: State, event: e.JobDeleted, at_ms: int) -> None:
    job = state.jobs.get(event.job_id)
    if job is None:
        return
    assert job.state in JOB_STATES_FINAL and not job.deleted_at_ms, "finished jobs are deleted, each once"
    assert not job.late, "nobody works for a deleted job"
    _let_go_of_outputs(state, job)
    job.results = []
    job.shares = {}
    job.blocks, job.kept = (), None
    job.block_size_sums, job.unit_nano_starts = (), ()
    job.deleted_at_ms, job.deleted_reason = at_ms, event.reason


def _let_go_of_outputs(state: State, job: Job) -> None:
    outputs = state.accounts[job.account_id].outputs
    for result in job.results:
        if result.output is not None:
            length_bytes, results = outputs.pop(result.output.digest)
            if results > 1:
                outputs[result.output.digest] = (length_bytes, results - 1)
