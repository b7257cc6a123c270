"""Jobs, their options and results, to protobuf and back."""

from __future__ import annotations

from collections.abc import Iterable

from fallow.credits import PoolMode
from fallow.errors import FallowError, Reason
from fallow.ids import Digest, JobId
from fallow.job import (
    DatasetBlock,
    Footprint,
    JobOptions,
    JobProgress,
    JobRowFailure,
    JobStatus,
    Objective,
    RowChecks,
    RowSpan,
    TaskResult,
    WorkerShare,
)
from fallow.limits import FAILED_ROWS_MAX_DEFAULT
from fallow.roles import DataClass
from fallow.v1 import job_pb2
from fallow.wire.blob import digest_from, reference_from_message, reference_to_message
from fallow.wire.enums import CAUSES, DATA_CLASSES, JOB_STATES, OBJECTIVES, PRECISIONS
from fallow.wire.moments import duration_from_message, duration_to_message, moment_from_message, moment_to_message
from fallow.wire.session import node_rows_from_messages, node_rows_to_messages


def options_to_message(options: JobOptions) -> job_pb2.JobOptions:
    """The protobuf form of a job's options."""
    return job_pb2.JobOptions(
        failed_rows_max=options.failed_rows_max,
        precision=PRECISIONS.number(options.precision),
        latency_ms_max=options.latency_ms_max,
        priority=options.priority,
        deadline=moment_to_message(options.deadline_ms) if options.deadline_ms else None,
        limit_microcredits_per_unit=options.limit_microcredits_per_unit,
        budget_microcredits=options.budget_microcredits,
        objective=OBJECTIVES.number(options.objective),
        region=options.region,
        device_kind=options.device_kind,
        memory_bytes_min=options.memory_bytes_min,
        assurance=options.assurance,
        retention=duration_to_message(options.retention_ms) if options.retention_ms else None,
        all_rows_may_fail=options.all_rows_may_fail,
    )


def options_from_message(message: job_pb2.JobOptions) -> JobOptions:
    """The options a message describes, with defaults for what is unset. Raises FIELD_INVALID."""
    return JobOptions(
        failed_rows_max=message.failed_rows_max if message.HasField("failed_rows_max") else FAILED_ROWS_MAX_DEFAULT,
        precision=PRECISIONS.optional(message.precision, "options.precision"),
        latency_ms_max=message.latency_ms_max,
        priority=message.priority,
        deadline_ms=moment_from_message(message.deadline),
        limit_microcredits_per_unit=message.limit_microcredits_per_unit,
        budget_microcredits=message.budget_microcredits,
        objective=OBJECTIVES.optional(message.objective, "options.objective") or Objective.COST,
        region=message.region,
        device_kind=message.device_kind,
        memory_bytes_min=message.memory_bytes_min,
        assurance=message.assurance,
        retention_ms=duration_from_message(message.retention),
        all_rows_may_fail=message.all_rows_may_fail,
    )


def pool_mode_from(word: str, field: str) -> PoolMode:
    """The mode of a word. Raises FIELD_INVALID."""
    try:
        return PoolMode(word)
    except ValueError:
        allowed = ", ".join(mode.value for mode in PoolMode)
        raise FallowError(
            Reason.FIELD_INVALID, f"{word[:40]!r} is no mode of a pool", field=field, limit=allowed
        ) from None


def block_to_message(block: DatasetBlock, inline_block: bytes) -> job_pb2.DatasetBlock:
    """The protobuf form of a dataset's block; `inline_block` is empty unless the block is inline."""
    return job_pb2.DatasetBlock(blob=reference_to_message(block.blob), rows=block.rows, inline_block=inline_block)


def block_from_message(message: job_pb2.DatasetBlock, field: str) -> tuple[DatasetBlock, bytes]:
    """The block and its inline bytes. Raises FIELD_INVALID or LIMIT_EXCEEDED."""
    blob = reference_from_message(message.blob, f"{field}.blob")
    return DatasetBlock(blob, message.rows, inline=bool(message.inline_block)), message.inline_block


def footprint_to_message(footprint: Footprint) -> job_pb2.Footprint | None:
    """The protobuf form of a footprint; None for none."""
    if footprint == Footprint():
        return None
    return job_pb2.Footprint(
        millijoules=footprint.millijoules,
        millijoules_measured=footprint.millijoules_measured,
        micrograms=footprint.micrograms,
        millijoules_unplaced=footprint.millijoules_unplaced,
    )


def footprint_from_message(message: job_pb2.Footprint) -> Footprint:
    """The footprint a message describes."""
    return Footprint(
        message.millijoules, message.millijoules_measured, message.micrograms, message.millijoules_unplaced
    )


def result_to_message(result: TaskResult, inline_output: bytes) -> job_pb2.TaskResult:
    """The protobuf form of a result; `inline_output` is empty when the block lies in the blob service."""
    return job_pb2.TaskResult(
        cursor=result.cursor,
        spans=[job_pb2.RowSpan(job_position=s.job_position, block_row=s.block_row, rows=s.rows) for s in result.spans],
        output=reference_to_message(result.output) if result.output else None,
        inline_output=inline_output,
        failures=[
            job_pb2.JobRowFailure(job_position=f.job_position, cause=CAUSES.number(f.cause), reason=f.reason)
            for f in result.failures
        ],
        worker_id=result.worker_id,
        node=result.node,
        output_root=result.output_root or b"",
        status=result.status,
        corrects=result.corrects,
        footprint=footprint_to_message(result.footprint),
        nodes=node_rows_to_messages(result.nodes),
    )


def result_from_message(message: job_pb2.TaskResult) -> tuple[TaskResult, bytes]:
    """The result and its inline output. Raises FIELD_INVALID."""
    result = TaskResult(
        cursor=message.cursor,
        spans=tuple(RowSpan(s.job_position, s.block_row, s.rows) for s in message.spans),
        output=reference_from_message(message.output, "result.output") if message.HasField("output") else None,
        failures=tuple(
            JobRowFailure(f.job_position, CAUSES.member(f.cause, "result.failures.cause"), f.reason)
            for f in message.failures
        ),
        worker_id=message.worker_id,
        node=message.node,
        output_root=digest_from(message.output_root, "result.output_root") if message.output_root else None,
        status=message.status,
        corrects=message.corrects,
        footprint=footprint_from_message(message.footprint),
        nodes=node_rows_from_messages(message.nodes, "result.nodes"),
    )
    return result, message.inline_output


def shares_to_messages(shares: Iterable[WorkerShare]) -> list[job_pb2.WorkerShare]:
    """The protobuf form of who delivered a job's rows."""
    return [job_pb2.WorkerShare(worker_id=one.worker_id, node=one.node, rows=one.rows) for one in shares]


def shares_from_messages(messages: Iterable[job_pb2.WorkerShare]) -> tuple[WorkerShare, ...]:
    """Who delivered a job's rows."""
    return tuple(WorkerShare(one.worker_id, one.node, one.rows) for one in messages)


def status_to_message(status: JobStatus) -> job_pb2.JobStatus:
    """The protobuf form of a job's status."""
    progress = status.progress
    return job_pb2.JobStatus(
        job_id=status.job_id,
        account_id=status.account_id,
        pool_id=status.pool_id,
        state=JOB_STATES.number(status.state),
        reason=status.reason,
        reason_code=status.reason_code,
        progress=job_pb2.JobProgress(
            rows_total=progress.rows_total,
            rows_done=progress.rows_done,
            rows_failed=progress.rows_failed,
            rows_leased=progress.rows_leased,
            tasks_settled=progress.tasks_settled,
            workers=progress.workers,
        ),
        bundle_digest=status.bundle_digest,
        title=status.title,
        data_class=DATA_CLASSES.number(DataClass(status.data_class)),
        policy=status.policy,
        price_microcredits=status.price_microcredits,
        submitted_at=moment_to_message(status.submitted_at_ms),
        finished_at=moment_to_message(status.finished_at_ms) if status.finished_at_ms else None,
        output_schema=status.output_schema,
        kept=reference_to_message(status.kept) if status.kept else None,
        results=status.results,
        deleted_at=moment_to_message(status.deleted_at_ms) if status.deleted_at_ms else None,
        pool_mode=status.pool_mode.value if status.pool_mode is not PoolMode.DONATION else "",
        budget_microcredits=status.budget_microcredits,
        spent_microcredits=status.spent_microcredits,
        reserved_microcredits=status.reserved_microcredits,
        warnings=status.warnings,
        footprint=footprint_to_message(status.footprint),
        deferred_until=moment_to_message(status.deferred_until_ms) if status.deferred_until_ms else None,
        checks=_checks_to_message(status.checks) if status.checks else None,
    )


def _checks_to_message(checks: RowChecks) -> job_pb2.RowChecks:
    return job_pb2.RowChecks(
        rows_drawn=checks.rows_drawn,
        rows_passed=checks.rows_passed,
        rows_by_referee=checks.rows_by_referee,
        rows_tied=checks.rows_tied,
        rows_wrong=checks.rows_wrong,
        rows_withdrawn=checks.rows_withdrawn,
        rows_trusted=checks.rows_trusted,
        accepted=checks.accepted,
    )


def _checks_from_message(message: job_pb2.RowChecks) -> RowChecks:
    return RowChecks(
        rows_drawn=message.rows_drawn,
        rows_passed=message.rows_passed,
        rows_by_referee=message.rows_by_referee,
        rows_tied=message.rows_tied,
        rows_wrong=message.rows_wrong,
        rows_withdrawn=message.rows_withdrawn,
        rows_trusted=message.rows_trusted,
        accepted=message.accepted,
    )


def status_from_message(message: job_pb2.JobStatus) -> JobStatus:
    """The status a message describes. Raises FIELD_INVALID."""
    progress = message.progress
    return JobStatus(
        job_id=JobId(message.job_id),
        account_id=message.account_id,
        pool_id=message.pool_id,
        state=JOB_STATES.member(message.state, "job.state"),
        reason=message.reason,
        reason_code=message.reason_code,
        bundle_digest=Digest(message.bundle_digest),
        title=message.title,
        data_class=DATA_CLASSES.member(message.data_class, "job.data_class").value,
        policy=message.policy,
        price_microcredits=message.price_microcredits,
        submitted_at_ms=moment_from_message(message.submitted_at),
        finished_at_ms=moment_from_message(message.finished_at),
        output_schema=message.output_schema,
        kept=reference_from_message(message.kept, "job.kept") if message.HasField("kept") else None,
        results=message.results,
        deleted_at_ms=moment_from_message(message.deleted_at),
        pool_mode=pool_mode_from(message.pool_mode, "job.pool_mode") if message.pool_mode else PoolMode.DONATION,
        budget_microcredits=message.budget_microcredits,
        spent_microcredits=message.spent_microcredits,
        reserved_microcredits=message.reserved_microcredits,
        warnings=tuple(message.warnings),
        footprint=footprint_from_message(message.footprint),
        deferred_until_ms=moment_from_message(message.deferred_until),
        checks=_checks_from_message(message.checks) if message.HasField("checks") else None,
        progress=JobProgress(
            rows_total=progress.rows_total,
            rows_done=progress.rows_done,
            rows_failed=progress.rows_failed,
            rows_leased=progress.rows_leased,
            tasks_settled=progress.tasks_settled,
            workers=progress.workers,
        ),
    )
