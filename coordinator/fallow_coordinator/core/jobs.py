"""Decisions about jobs: submission, cancelling, packing, archiving."""

from __future__ import annotations

from dataclasses import replace

from fallow.assurance import assurance_of
from fallow.credits import ASK_MICROCREDITS_PER_UNIT_MAX, MICROCREDITS_MAX, PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId, PoolId, TaskId
from fallow.job import JOB_STATES_FINAL, JobOptions, JobState
from fallow.limits import (
    BLOCK_BYTES_MAX,
    BLOCK_ROWS_MAX,
    INLINE_PAYLOAD_BYTES_MAX,
    JOB_BLOCKS_MAX,
    JOB_ROWS_MAX,
    TITLE_BYTES_MAX,
)
from fallow.region import REGION_RULE, is_region
from fallow.session import DeviceKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core import verification_events as v
from fallow_coordinator.core.admission import check_admitted
from fallow_coordinator.core.answers import Decision, JobAccepted
from fallow_coordinator.core.bundles import account_of, usable_bundle
from fallow_coordinator.core.deferral import held_back
from fallow_coordinator.core.draft import Draft, shortened
from fallow_coordinator.core.limits import (
    ARCHIVED_PER_COMMAND_MAX,
    BLOCKS_UNFINISHED_PER_ACCOUNT_MAX,
    DAY_MS,
    DEADLINE_MS_MAX,
    EXPIRED_PER_COMMAND_MAX,
    IDEMPOTENCY_KEY_BYTES_MAX,
    IDEMPOTENCY_KEY_BYTES_MIN,
    IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX,
    IDEMPOTENCY_MS,
    JOBS_UNFINISHED_PER_ACCOUNT_MAX,
    LATENCY_MS_MAX_MAX,
    MEMORY_BYTES_MIN_MAX,
    PACK_ATTEMPTS_MAX,
    PRIORITY_MAX,
    RETENTION_MS_DEFAULT,
    RETENTION_MS_MAX,
    RETENTION_MS_MIN,
    RETRY_DELAY_MS_MAX,
    RETRY_DELAY_MS_MIN,
    SECOND_MS,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.needs import needs_of_job
from fallow_coordinator.core.queueing import queued
from fallow_coordinator.core.state import Account, Bundle, Pool, State, Task, TaskPhase
from fallow_coordinator.core.treasury import check_funds

DELETED_BY_OWNER = "deleted by its owner"
DELETED_BY_TIME = "its retention is over"


def submit_map_job(state: State, command: c.SubmitMapJob, now_ms: int, names: Names) -> Decision:
    """A map job; the same idempotency key with the same request gives the same job for 24 hours.

    Raises ACCOUNT_UNKNOWN, POOL_UNKNOWN, PERMISSION_DENIED, BUNDLE_UNKNOWN, PROGRAM_REFUSED, PROGRAM_HELD,
    BUNDLE_INVALID, DATASET_EMPTY, LIMIT_EXCEEDED, FIELD_MISSING, INSUFFICIENT_CREDITS, BLOCK_TOO_LARGE, BLOB_UNKNOWN,
    SCHEMA_MISMATCH, ROW_BLOCK_MALFORMED, FIELD_INVALID, IDEMPOTENCY_CONFLICT, OVERLOADED.
    """
    account = account_of(state, command.account_id)
    repeated = _repeated(state, command, now_ms)
    if repeated is not None:
        return Decision(answer=JobAccepted(repeated, repeated=True))
    if account.idempotency_keys >= IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.OVERLOADED,
            "the account submitted too many jobs today",
            field="idempotency_key",
            limit=f"{IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX} jobs in 24 hours",
        )
    if account.jobs_unfinished >= JOBS_UNFINISHED_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.OVERLOADED,
            "the account has too many unfinished jobs",
            field="account_id",
            limit=f"{JOBS_UNFINISHED_PER_ACCOUNT_MAX} unfinished jobs",
            hint="wait for some to finish",
        )
    if account.blocks_unfinished + len(command.blocks) > BLOCKS_UNFINISHED_PER_ACCOUNT_MAX:
        raise FallowError(
            Reason.OVERLOADED,
            f"the account's unfinished jobs have {account.blocks_unfinished} blocks",
            field="blocks",
            limit=f"{BLOCKS_UNFINISHED_PER_ACCOUNT_MAX} blocks in unfinished jobs",
            hint="wait for some to finish, or pack more rows into a block",
        )
    pool_id = _pool_of(state, command)
    _check_options(command, now_ms)
    held_microcredits = _budget(state, command, pool_id)
    options = _written_out(state.pools[pool_id].mode, command.options)
    bundle = usable_bundle(state, account, command.bundle_digest)
    block_sums = _check_blocks(account, bundle, command)
    job_id = JobId(names.new("job"))
    events: list[e.Event] = [
        e.JobSubmitted(
            job_id=job_id,
            account_id=command.account_id,
            party_id=command.party_id,
            pool_id=pool_id,
            idempotency_key=command.idempotency_key,
            request_digest=command.request_digest,
            bundle_digest=command.bundle_digest,
            blocks=command.blocks,
            size_feature_sums=tuple(
                sum(sums[feature] for sums in block_sums) for feature in range(bundle.size_feature_count)
            ),
            rows=sum(block.rows for block in command.blocks),
            data_class=command.data_class,
            title=command.title,
            options=options,
            kept=command.kept,
            policy=policy_of(options, state.pools[pool_id]),
            price_microcredits=0,
            held_microcredits=held_microcredits,
            block_size_sums=block_sums if bundle.size_feature_count else (),
        )
    ]
    if options.assurance:
        events.append(v.DrawSecretSet(job_id=job_id, secret=names.draw()))
    if bundle.report is not None:
        needs = needs_of_job(options, pool_id=pool_id, data_class=command.data_class, mode=state.pools[pool_id].mode)
        blocks, report = command.blocks, bundle.report
        events.append(queued(state, job_id, needs=needs, options=options, blocks=blocks, report=report, now_ms=now_ms))
        events.extend(held_back(state, job_id, options.objective, now_ms))
    return Decision(tuple(events), JobAccepted(job_id, repeated=False))


def cancel_job(state: State, command: c.CancelJob) -> Decision:
    """Ends the job; its leases are revoked. Once cancelled, nothing happens. Raises JOB_UNKNOWN, JOB_FINISHED."""
    job = state.jobs.get(command.job_id)
    if job is None or job.account_id != command.account_id:
        raise FallowError(Reason.JOB_UNKNOWN, f"this account has no job {command.job_id}", field="job_id")
    if job.state is JobState.CANCELLED:
        return Decision()
    if job.state in JOB_STATES_FINAL:
        raise FallowError(Reason.JOB_FINISHED, f"the job is {job.state.value} already", field="job_id")
    draft = Draft(state)
    draft.finish(job, JobState.CANCELLED, "cancelled by its owner", Reason.JOB_CANCELLED)
    return Decision(tuple(draft.events))


def delete_job(state: State, command: c.DeleteJob) -> Decision:
    """Lets go of what a finished job keeps. Once deleted, nothing happens. Raises JOB_UNKNOWN, JOB_UNFINISHED."""
    job = state.jobs.get(command.job_id)
    if (job is None and not command.archived) or (job is not None and job.account_id != command.account_id):
        raise FallowError(Reason.JOB_UNKNOWN, f"this account has no job {command.job_id}", field="job_id")
    if job is not None and job.deleted_at_ms:
        return Decision()
    if job is not None and job.state not in JOB_STATES_FINAL:
        raise FallowError(
            Reason.JOB_UNFINISHED,
            f"the job is {job.state.value}; only a job that has ended can be deleted",
            field="job_id",
            hint=f"`fallow job cancel {command.job_id}` ends it",
        )
    draft = Draft(state)
    if job is not None:
        draft.end_late_leases(job, DELETED_BY_OWNER)
    return Decision((*draft.events, e.JobDeleted(command.job_id, command.account_id, DELETED_BY_OWNER)))


def expire_jobs(state: State, command: c.ExpireJobs) -> Decision:
    """Lets go of what these jobs keep, except of those that are deleted already."""
    assert len(command.jobs) <= EXPIRED_PER_COMMAND_MAX, "the collector asks page by page"
    draft = Draft(state)
    for account_id, job_id in command.jobs:
        job = state.jobs.get(job_id)
        if job is None or (job.state in JOB_STATES_FINAL and not job.deleted_at_ms):
            if job is not None:
                draft.end_late_leases(job, DELETED_BY_TIME)
            draft.events.append(e.JobDeleted(job_id, account_id, DELETED_BY_TIME))
    return Decision(tuple(draft.events))


def task_packed(state: State, command: c.TaskPacked) -> Decision:
    """The task can be leased. An answer to an older packing changes nothing."""
    task = _task_in_packing(state, command.task_id, command.pack_number)
    if task is None:
        return Decision()
    if command.input.length_bytes > BLOCK_BYTES_MAX:
        return _packing_is_hopeless(state, task, f"the packed block has {command.input.length_bytes} bytes")
    event = e.TaskInputPacked(
        task_id=command.task_id,
        pack_number=command.pack_number,
        input=command.input,
        inline=command.inline,
        candidates=command.candidates,
        execution_classes=command.execution_classes,
    )
    return Decision((event,))


def pack_failed(state: State, command: c.PackFailed, now_ms: int) -> Decision:
    """Tried again after a while, or, when a source is gone or it failed too often, the end of the job."""
    task = _task_in_packing(state, command.task_id, command.pack_number)
    if task is None:
        return Decision()
    if not command.retryable or task.pack_failures + 1 >= PACK_ATTEMPTS_MAX:
        return _packing_is_hopeless(state, task, command.reason)
    delay_ms = min(RETRY_DELAY_MS_MAX, RETRY_DELAY_MS_MIN << min(task.pack_failures, 16))
    event = e.PackingFailed(
        task_id=command.task_id,
        pack_number=command.pack_number,
        retry_at_ms=now_ms + delay_ms,
        reason=shortened(command.reason),
    )
    return Decision((event,))


def archive_jobs(state: State, command: c.ArchiveJobs) -> Decision:
    """Finished jobs that the views show leave the state, oldest first, so many at a time."""
    events: list[e.Event] = []
    for job_id, end_sequence in state.finished.items():
        if state.jobs[job_id].late:
            continue
        if end_sequence > command.view_sequence or len(events) >= ARCHIVED_PER_COMMAND_MAX:
            break
        events.append(e.JobArchived(job_id=job_id))
    return Decision(tuple(events))


def _task_in_packing(state: State, task_id: TaskId, pack_number: int) -> Task | None:
    task = state.tasks.get(task_id)
    if task is None or task.phase is not TaskPhase.PACKING or task.pack_number != pack_number:
        return None
    return task


def _packing_is_hopeless(state: State, task: Task, reason: str) -> Decision:
    assert task.job_id is not None, "only rows of jobs are packed"
    draft = Draft(state)
    text = shortened(f"the rows could not be packed: {reason}")
    draft.finish(state.jobs[task.job_id], JobState.FAILED, text, Reason.BLOB_UNKNOWN)
    return Decision(tuple(draft.events))


def _repeated(state: State, command: c.SubmitMapJob, now_ms: int) -> JobId | None:
    size = len(command.idempotency_key)
    if not IDEMPOTENCY_KEY_BYTES_MIN <= size <= IDEMPOTENCY_KEY_BYTES_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the idempotency key has {size} bytes",
            field="idempotency_key",
            limit=f"{IDEMPOTENCY_KEY_BYTES_MIN} to {IDEMPOTENCY_KEY_BYTES_MAX} bytes",
        )
    record = state.idempotency.get((command.account_id, command.idempotency_key))
    if record is None or now_ms - record.at_ms >= IDEMPOTENCY_MS:
        return None
    if record.request_digest != command.request_digest:
        raise FallowError(
            Reason.IDEMPOTENCY_CONFLICT,
            f"this key has made {record.job_id} from another request",
            field="idempotency_key",
            hint="use a fresh key for a new job",
        )
    return record.job_id


def _pool_of(state: State, command: c.SubmitMapJob) -> PoolId:
    if command.pool_id is not None:
        pool_id = command.pool_id
    else:
        party = state.parties.get(command.party_id)
        pool_id = party.pool_id if party is not None else state.default_pool_id
    check_admitted(state, command.account_id, pool_id)
    return pool_id


def _written_out(mode: PoolMode, options: JobOptions) -> JobOptions:
    """With defaults as numbers: a later default is not for jobs of today. A budget without a limit allows any price."""
    limit = options.limit_microcredits_per_unit
    if mode is PoolMode.MARKET and options.budget_microcredits and not limit:
        limit = ASK_MICROCREDITS_PER_UNIT_MAX
    return replace(
        options, retention_ms=options.retention_ms or RETENTION_MS_DEFAULT, limit_microcredits_per_unit=limit
    )


def _budget(state: State, command: c.SubmitMapJob, pool_id: PoolId) -> int:
    """What the job holds of its account's credits: its budget where somebody is paid."""
    options = command.options
    if state.pools[pool_id].mode is not PoolMode.MARKET:
        return 0
    if options.limit_microcredits_per_unit and not options.budget_microcredits:
        raise FallowError(
            Reason.FIELD_MISSING,
            "the job has a limit and no budget to pay from",
            field="options.budget_microcredits",
            limit="more than 0 micro-credits",
            hint="state a budget as well; without both only workers that ask nothing, and your own, do the work",
        )
    check_funds(state, command.account_id, options.budget_microcredits, "options.budget_microcredits")
    return options.budget_microcredits


def _check_options(command: c.SubmitMapJob, now_ms: int) -> None:
    options = command.options
    size = len(command.title.encode("utf-8", errors="replace"))
    if size > TITLE_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the title has {size} bytes",
            field="title",
            limit=f"{TITLE_BYTES_MAX} bytes of UTF-8",
        )
    if not 0 <= options.failed_rows_max <= JOB_ROWS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"failed_rows_max is {options.failed_rows_max}",
            field="options.failed_rows_max",
            limit=f"0 to {JOB_ROWS_MAX} rows",
        )
    if options.retention_ms and not RETENTION_MS_MIN <= options.retention_ms <= RETENTION_MS_MAX:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"a retention of {options.retention_ms} ms",
            field="options.retention",
            limit=f"{RETENTION_MS_MIN // SECOND_MS} second to {RETENTION_MS_MAX // DAY_MS} days",
        )
    check_needs(options, now_ms)
    check_assurance(options)


def check_assurance(options: JobOptions) -> None:
    """Raises FIELD_INVALID for an assurance that there is not."""
    if options.assurance:
        assurance_of(options.assurance)


def policy_of(options: JobOptions, pool: Pool) -> str:
    """By what a job's rows are checked, in a few words."""
    return f"assurance {options.assurance}" if options.assurance else pool.policy


def check_needs(options: JobOptions, now_ms: int) -> None:
    """What a job may ask of workers: absurd wishes are refused here, impossible ones are explained later."""
    ranges = (
        ("priority", options.priority, PRIORITY_MAX, ""),
        ("memory_bytes_min", options.memory_bytes_min, MEMORY_BYTES_MIN_MAX, " bytes"),
        ("latency_ms_max", options.latency_ms_max, LATENCY_MS_MAX_MAX, " ms"),
        (
            "limit_microcredits_per_unit",
            options.limit_microcredits_per_unit,
            ASK_MICROCREDITS_PER_UNIT_MAX,
            " micro-credits",
        ),
        ("budget_microcredits", options.budget_microcredits, MICROCREDITS_MAX, " micro-credits"),
    )
    for name, value, most, unit in ranges:
        if not 0 <= value <= most:
            raise _not_allowed(name, f"{name} is {value}", f"0 to {most}{unit}")
    if options.device_kind and options.device_kind not in tuple(DeviceKind):
        raise _not_allowed(
            "device_kind",
            f"there is no device kind {shortened(options.device_kind)!r}",
            ", ".join(kind.value for kind in DeviceKind),
        )
    if options.region and not is_region(options.region):
        raise _not_allowed(
            "region",
            "this is no name of a region",
            REGION_RULE,
        )
    if options.deadline_ms and not now_ms < options.deadline_ms <= now_ms + DEADLINE_MS_MAX:
        past = options.deadline_ms <= now_ms
        away_s = abs(options.deadline_ms - now_ms) // SECOND_MS
        raise _not_allowed(
            "deadline",
            f"the deadline {'was' if past else 'is in'} {away_s} seconds{' ago' if past else ''}",
            f"from now on, at most {DEADLINE_MS_MAX // DAY_MS} days ahead",
        )


def _not_allowed(option: str, message: str, limit: str) -> FallowError:
    return FallowError(Reason.FIELD_INVALID, message, field=f"options.{option}", limit=limit)


def _check_blocks(account: Account, bundle: Bundle, command: c.SubmitMapJob) -> tuple[tuple[int, ...], ...]:
    """Checks every block against what is recorded of it; gives the sums of the size features of each."""
    _check_counts(command)
    inline = {stored.blob.digest: stored for stored in command.inline_blocks}
    sums: list[tuple[int, ...]] = []
    inline_bytes = 0
    for index, block in enumerate(command.blocks):
        field = f"blocks[{index}]"
        if block.inline:
            inline_bytes += block.blob.length_bytes
            stored = inline.get(block.blob.digest)
        else:
            stored = account.blobs.get(block.blob.digest)
        if stored is None or stored.blob != block.blob:
            raise _blob_unknown(block.blob.digest, field)
        _check_block(bundle, stored, block.rows, field)
        sums.append(stored.size_feature_sums)
    if inline_bytes > INLINE_PAYLOAD_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the inline blocks have {inline_bytes} bytes",
            field="blocks",
            limit=f"{INLINE_PAYLOAD_BYTES_MAX} bytes",
            hint="upload them to the blob service",
        )
    if command.kept is not None:
        kept = account.blobs.get(command.kept.digest)
        if kept is None or kept.blob != command.kept:
            raise _blob_unknown(command.kept.digest, "kept")
    return tuple(sums)


def _check_counts(command: c.SubmitMapJob) -> None:
    if len(command.blocks) > JOB_BLOCKS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"the dataset has {len(command.blocks)} blocks",
            field="blocks",
            limit=f"{JOB_BLOCKS_MAX} blocks",
        )
    for index, block in enumerate(command.blocks):
        if not 1 <= block.rows <= BLOCK_ROWS_MAX:
            raise FallowError(
                Reason.LIMIT_EXCEEDED if block.rows else Reason.DATASET_EMPTY,
                f"the block has {block.rows} rows",
                field=f"blocks[{index}].rows",
                limit=f"1 to {BLOCK_ROWS_MAX} rows",
            )
        if not 1 <= block.blob.length_bytes <= BLOCK_BYTES_MAX:
            raise FallowError(
                Reason.BLOCK_TOO_LARGE,
                f"the block has {block.blob.length_bytes} bytes",
                field=f"blocks[{index}].blob.length_bytes",
                limit=f"1 to {BLOCK_BYTES_MAX} bytes",
            )
    rows = sum(block.rows for block in command.blocks)
    if not rows:
        raise FallowError(Reason.DATASET_EMPTY, "the dataset has no rows", field="blocks", limit="at least 1 row")
    if rows > JOB_ROWS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED, f"the dataset has {rows} rows", field="blocks", limit=f"{JOB_ROWS_MAX} rows"
        )


def _check_block(bundle: Bundle, stored: c.StoredBlob, rows: int, field: str) -> None:
    if not stored.rows or stored.root is None:
        raise FallowError(Reason.ROW_BLOCK_MALFORMED, "the blob is not a row block", field=field)
    if stored.schema_digest != bundle.input_schema_digest:
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            "the block's rows do not have the bundle's input schema",
            field=field,
            hint="encode the rows with the columns, types and shapes that `fallow bundle inspect` shows",
        )
    if stored.rows != rows:
        raise FallowError(
            Reason.FIELD_INVALID,
            f"the block has {stored.rows} rows, not {rows}",
            field=f"{field}.rows",
            limit=f"{stored.rows}",
        )
    if len(stored.size_feature_sums) != bundle.size_feature_count:
        raise FallowError(
            Reason.SCHEMA_MISMATCH,
            f"the block has {len(stored.size_feature_sums)} size features",
            field=field,
            limit=f"{bundle.size_feature_count}",
        )


def _blob_unknown(digest: Digest, field: str) -> FallowError:
    return FallowError(
        Reason.BLOB_UNKNOWN,
        f"this account has no blob {digest.hex()[:16]}… of this length",
        field=field,
        hint="upload it first",
    )
