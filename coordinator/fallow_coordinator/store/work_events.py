"""Blobs, bundles, jobs, tasks and leases: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import AccountId, Digest, JobId, LeaseId, PartyId, PoolId, SessionId, TaskId
from fallow.job import DatasetBlock
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store import values, verification_events
from fallow_coordinator.store.event_kind import AnyKind, Kind


def _blob_recorded_to(event: ev.BlobRecorded) -> pb.BlobRecorded:
    return pb.BlobRecorded(
        account_id=event.account_id,
        blob=values.blob_to_message(event.blob),
        rows=event.rows,
        root=event.root,
        schema_digest=event.schema_digest,
        size_feature_sums=event.size_feature_sums,
        rows_failed=event.rows_failed,
    )


def _blob_recorded_from(message: pb.BlobRecorded) -> ev.BlobRecorded:
    return ev.BlobRecorded(
        account_id=AccountId(message.account_id),
        blob=values.blob_from_message(message.blob),
        rows=message.rows,
        root=Digest(message.root) if message.HasField("root") else None,
        schema_digest=Digest(message.schema_digest) if message.HasField("schema_digest") else None,
        size_feature_sums=tuple(message.size_feature_sums),
        rows_failed=message.rows_failed,
    )


def _bundle_registered_to(event: ev.BundleRegistered) -> pb.BundleRegistered:
    return pb.BundleRegistered(
        account_id=event.account_id,
        bundle_digest=event.bundle_digest,
        files=[values.blob_to_message(blob) for blob in event.files],
        input_schema_digest=event.input_schema_digest,
        output_schema_digest=event.output_schema_digest,
        size_feature_count=event.size_feature_count,
        bytes_feature_index=event.bytes_feature_index,
        output_row_bytes=event.output_row_bytes,
    )


def _bundle_registered_from(message: pb.BundleRegistered) -> ev.BundleRegistered:
    return ev.BundleRegistered(
        account_id=AccountId(message.account_id),
        bundle_digest=Digest(message.bundle_digest),
        files=values.blobs_from_messages(message.files),
        input_schema_digest=Digest(message.input_schema_digest),
        output_schema_digest=Digest(message.output_schema_digest),
        size_feature_count=message.size_feature_count,
        bytes_feature_index=message.bytes_feature_index,
        output_row_bytes=message.output_row_bytes,
    )


def _job_submitted_to(event: ev.JobSubmitted) -> pb.JobSubmitted:
    return pb.JobSubmitted(
        job_id=event.job_id,
        account_id=event.account_id,
        party_id=event.party_id,
        pool_id=event.pool_id,
        idempotency_key=event.idempotency_key,
        request_digest=event.request_digest,
        bundle_digest=event.bundle_digest,
        blocks=[
            pb.JobBlock(blob=values.blob_to_message(block.blob), rows=block.rows, inline=block.inline)
            for block in event.blocks
        ],
        size_feature_sums=event.size_feature_sums,
        rows=event.rows,
        data_class=values.DATA_CLASSES.number(event.data_class),
        title=event.title,
        options=values.options_to_message(event.options),
        kept=None if event.kept is None else values.blob_to_message(event.kept),
        policy=event.policy,
        price_microcredits=event.price_microcredits,
        held_microcredits=event.held_microcredits,
        block_size_sums=[pb.SizeSums(sums=sums) for sums in event.block_size_sums],
    )


def _job_submitted_from(message: pb.JobSubmitted) -> ev.JobSubmitted:
    return ev.JobSubmitted(
        job_id=JobId(message.job_id),
        account_id=AccountId(message.account_id),
        party_id=PartyId(message.party_id),
        pool_id=PoolId(message.pool_id),
        idempotency_key=message.idempotency_key,
        request_digest=Digest(message.request_digest),
        bundle_digest=Digest(message.bundle_digest),
        blocks=tuple(
            [DatasetBlock(values.blob_from_message(block.blob), block.rows, block.inline) for block in message.blocks]
        ),
        size_feature_sums=tuple(message.size_feature_sums),
        rows=message.rows,
        data_class=values.DATA_CLASSES.member(message.data_class),
        title=message.title,
        options=values.options_from_message(message.options),
        kept=values.blob_from_message(message.kept) if message.HasField("kept") else None,
        policy=message.policy,
        price_microcredits=message.price_microcredits,
        held_microcredits=message.held_microcredits,
        block_size_sums=tuple([tuple(sizes.sums) for sizes in message.block_size_sums]),
    )


def encode_submission(event: ev.JobSubmitted) -> bytes:
    """A submission as the views keep it: in the journal's own form."""
    return _job_submitted_to(event).SerializeToString(deterministic=True)


def decode_submission(data: bytes) -> ev.JobSubmitted:
    """The submission that `encode_submission` gave."""
    return _job_submitted_from(pb.JobSubmitted.FromString(data))


def _task_created_to(event: ev.TaskCreated) -> pb.TaskCreated:
    return pb.TaskCreated(
        task_id=event.task_id,
        kind=values.TASK_KINDS.number(event.kind),
        job_id=event.job_id,
        bundle_digest=event.bundle_digest,
        pool_id=event.pool_id,
        spans=[position for span in event.spans for position in span],
        unit_micros=event.unit_micros,
        challenge_task_id=event.challenge_task_id,
        share_key=event.share_key,
        checks=verification_events.rows_to_message(event.checks) if event.checks else None,
        corrects=event.corrects,
    )


def _task_created_from(message: pb.TaskCreated) -> ev.TaskCreated:
    flat = list(message.spans)
    return ev.TaskCreated(
        task_id=TaskId(message.task_id),
        kind=values.TASK_KINDS.member(message.kind),
        job_id=JobId(message.job_id) if message.HasField("job_id") else None,
        bundle_digest=Digest(message.bundle_digest),
        pool_id=PoolId(message.pool_id),
        spans=tuple(zip(flat[::2], flat[1::2], strict=True)),
        unit_micros=message.unit_micros,
        challenge_task_id=TaskId(message.challenge_task_id) if message.HasField("challenge_task_id") else None,
        share_key=message.share_key,
        checks=verification_events.rows_from_message(message.checks) if message.checks else (),
        corrects=message.corrects,
    )


def _lease_granted_to(event: ev.LeaseGranted) -> pb.LeaseGranted:
    return pb.LeaseGranted(
        lease_id=event.lease_id,
        task_id=event.task_id,
        worker_id=event.worker_id,
        session_id=event.session_id,
        fence=event.fence,
        deadline_ms=event.deadline_ms,
        runtime_max_ms=event.runtime_max_ms,
        price_microcredits_per_unit=event.price_microcredits_per_unit,
        reserved_microcredits=event.reserved_microcredits,
        duplicate=event.duplicate,
        share_key=event.share_key,
    )


def _lease_granted_from(message: pb.LeaseGranted) -> ev.LeaseGranted:
    return ev.LeaseGranted(
        lease_id=LeaseId(message.lease_id),
        task_id=TaskId(message.task_id),
        worker_id=PartyId(message.worker_id),
        session_id=SessionId(message.session_id),
        fence=message.fence,
        deadline_ms=message.deadline_ms,
        runtime_max_ms=message.runtime_max_ms,
        price_microcredits_per_unit=message.price_microcredits_per_unit,
        reserved_microcredits=message.reserved_microcredits,
        duplicate=message.duplicate,
        share_key=message.share_key,
    )


_OUTCOMES = values.EnumTable(ev.LeaseOutcome, pb.LeaseOutcome.Value, "LEASE_OUTCOME")


def _commitment_recorded_to(event: ev.CommitmentRecorded) -> pb.CommitmentRecorded:
    return pb.CommitmentRecorded(
        lease_id=event.lease_id,
        output_root=event.output_root,
        rows=event.rows,
        output=values.blob_to_message(event.output),
        inline=event.inline,
        failures=values.failures_to_messages(event.failures),
        rows_failed=event.rows_failed,
        usage=values.usage_to_message(event.usage),
        execution_class=event.execution_class,
        message_digest=event.message_digest,
        signature=event.signature,
        sequence=event.sequence,
        millijoules=event.millijoules,
        energy_measured=event.energy_measured,
    )


def _commitment_recorded_from(message: pb.CommitmentRecorded) -> ev.CommitmentRecorded:
    return ev.CommitmentRecorded(
        lease_id=LeaseId(message.lease_id),
        output_root=Digest(message.output_root),
        rows=message.rows,
        output=values.blob_from_message(message.output),
        inline=message.inline,
        failures=values.failures_from_messages(message.failures),
        rows_failed=message.rows_failed,
        usage=values.usage_from_message(message.usage),
        execution_class=message.execution_class,
        message_digest=Digest(message.message_digest),
        signature=message.signature,
        sequence=message.sequence,
        millijoules=message.millijoules,
        energy_measured=message.energy_measured,
    )


KINDS: tuple[AnyKind, ...] = (
    Kind("blob_recorded", ev.BlobRecorded, _blob_recorded_to, _blob_recorded_from),
    Kind("bundle_registered", ev.BundleRegistered, _bundle_registered_to, _bundle_registered_from),
    Kind(
        "bundle_inspected",
        ev.BundleInspected,
        lambda event: pb.BundleInspected(
            bundle_digest=event.bundle_digest,
            task_id=event.task_id,
            worker_id=event.worker_id,
            report=values.report_to_message(event.report),
        ),
        lambda message: ev.BundleInspected(
            bundle_digest=Digest(message.bundle_digest),
            task_id=TaskId(message.task_id),
            worker_id=PartyId(message.worker_id),
            report=values.report_from_message(message.report),
        ),
    ),
    Kind(
        "bundle_cost_learned",
        ev.BundleCostLearned,
        lambda event: pb.BundleCostLearned(bundle_digest=event.bundle_digest, cost_permille=event.cost_permille),
        lambda message: ev.BundleCostLearned(Digest(message.bundle_digest), message.cost_permille),
    ),
    Kind(
        "bundle_held",
        ev.BundleHeld,
        lambda event: pb.BundleHeld(bundle_digest=event.bundle_digest, reason=event.reason),
        lambda message: ev.BundleHeld(Digest(message.bundle_digest), message.reason),
    ),
    Kind(
        "bundle_crashed",
        ev.BundleCrashed,
        lambda event: pb.BundleCrashed(
            bundle_digest=event.bundle_digest, account_id=event.account_id, reason=event.reason
        ),
        lambda message: ev.BundleCrashed(Digest(message.bundle_digest), AccountId(message.account_id), message.reason),
    ),
    Kind("job_submitted", ev.JobSubmitted, _job_submitted_to, _job_submitted_from),
    Kind(
        "job_state_changed",
        ev.JobStateChanged,
        lambda event: pb.JobStateChanged(
            job_id=event.job_id,
            state=values.JOB_STATES.number(event.state),
            reason=event.reason,
            reason_code=event.reason_code,
            due_ms=event.due_ms,
            cost_permille=event.cost_permille,
        ),
        lambda message: ev.JobStateChanged(
            job_id=JobId(message.job_id),
            state=values.JOB_STATES.member(message.state),
            reason=message.reason,
            reason_code=message.reason_code,
            due_ms=message.due_ms,
            cost_permille=message.cost_permille,
        ),
    ),
    Kind(
        "job_archived",
        ev.JobArchived,
        lambda event: pb.JobArchived(job_id=event.job_id),
        lambda message: ev.JobArchived(JobId(message.job_id)),
    ),
    Kind(
        "job_deleted",
        ev.JobDeleted,
        lambda event: pb.JobDeleted(job_id=event.job_id, account_id=event.account_id, reason=event.reason),
        lambda message: ev.JobDeleted(JobId(message.job_id), AccountId(message.account_id), message.reason),
    ),
    Kind(
        "blobs_forgotten",
        ev.BlobsForgotten,
        lambda event: pb.BlobsForgotten(digests=event.digests),
        lambda message: ev.BlobsForgotten(tuple([Digest(digest) for digest in message.digests])),
    ),
    Kind(
        "blob_quota_set",
        ev.BlobQuotaSet,
        lambda event: pb.BlobQuotaSet(account_id=event.account_id, bytes_max=event.bytes_max),
        lambda message: ev.BlobQuotaSet(AccountId(message.account_id), message.bytes_max),
    ),
    Kind("task_created", ev.TaskCreated, _task_created_to, _task_created_from),
    Kind(
        "pack_requested",
        ev.PackRequested,
        lambda event: pb.PackRequested(task_id=event.task_id, pack_number=event.pack_number),
        lambda message: ev.PackRequested(TaskId(message.task_id), message.pack_number),
    ),
    Kind(
        "task_input_packed",
        ev.TaskInputPacked,
        lambda event: pb.TaskInputPacked(
            task_id=event.task_id,
            pack_number=event.pack_number,
            input=values.blob_to_message(event.input),
            inline=event.inline,
            candidates=verification_events.candidates_to_message(event.candidates) if event.candidates else None,
            execution_classes=event.execution_classes,
        ),
        lambda message: ev.TaskInputPacked(
            task_id=TaskId(message.task_id),
            pack_number=message.pack_number,
            input=values.blob_from_message(message.input),
            inline=message.inline,
            candidates=verification_events.candidates_from_message(message.candidates) if message.candidates else (),
            execution_classes=tuple(message.execution_classes),
        ),
    ),
    Kind(
        "packing_failed",
        ev.PackingFailed,
        lambda event: pb.PackingFailed(
            task_id=event.task_id, pack_number=event.pack_number, retry_at_ms=event.retry_at_ms, reason=event.reason
        ),
        lambda message: ev.PackingFailed(
            task_id=TaskId(message.task_id),
            pack_number=message.pack_number,
            retry_at_ms=message.retry_at_ms,
            reason=message.reason,
        ),
    ),
    Kind("lease_granted", ev.LeaseGranted, _lease_granted_to, _lease_granted_from),
    Kind(
        "lease_ended",
        ev.LeaseEnded,
        lambda event: pb.LeaseEnded(
            lease_id=event.lease_id,
            outcome=_OUTCOMES.number(event.outcome),
            cause=values.CAUSES.number(event.cause),
            reason=event.reason,
        ),
        lambda message: ev.LeaseEnded(
            lease_id=LeaseId(message.lease_id),
            outcome=_OUTCOMES.member(message.outcome),
            cause=values.CAUSES.member(message.cause),
            reason=message.reason,
        ),
    ),
    Kind("commitment_recorded", ev.CommitmentRecorded, _commitment_recorded_to, _commitment_recorded_from),
    Kind(
        "task_settled",
        ev.TaskSettled,
        lambda event: pb.TaskSettled(
            task_id=event.task_id,
            lease_id=event.lease_id,
            cursor=event.cursor,
            rows=event.rows,
            rows_failed=event.rows_failed,
            microcredits=event.microcredits,
            speed_milliunits_per_s=event.speed_milliunits_per_s,
            released=event.released,
            contribution_microcredits=event.contribution_microcredits,
            footprint=values.footprint_to_message(event.footprint),
            worked_unit_micros=event.worked_unit_micros,
        ),
        lambda message: ev.TaskSettled(
            task_id=TaskId(message.task_id),
            lease_id=LeaseId(message.lease_id),
            cursor=message.cursor,
            rows=message.rows,
            rows_failed=message.rows_failed,
            microcredits=message.microcredits,
            speed_milliunits_per_s=message.speed_milliunits_per_s,
            released=message.released,
            contribution_microcredits=message.contribution_microcredits,
            footprint=values.footprint_from_message(message.footprint),
            worked_unit_micros=message.worked_unit_micros,
        ),
    ),
    Kind(
        "task_abandoned",
        ev.TaskAbandoned,
        lambda event: pb.TaskAbandoned(
            task_id=event.task_id,
            cursor=event.cursor,
            rows=event.rows,
            cause=values.CAUSES.number(event.cause),
            reason=event.reason,
        ),
        lambda message: ev.TaskAbandoned(
            task_id=TaskId(message.task_id),
            cursor=message.cursor,
            rows=message.rows,
            cause=values.CAUSES.member(message.cause),
            reason=message.reason,
        ),
    ),
    Kind(
        "task_dropped",
        ev.TaskDropped,
        lambda event: pb.TaskDropped(task_id=event.task_id),
        lambda message: ev.TaskDropped(TaskId(message.task_id)),
    ),
)
