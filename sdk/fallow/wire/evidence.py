"""Evidence ↔ protobuf: the records of a job, as facts, and the statement that goes with them."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.job_records import (
    Abandoned,
    Committed,
    DatasetPart,
    EvidenceWorker,
    Fact,
    Funded,
    Granted,
    Moved,
    RawRecord,
    Settled,
    Statement,
    Submitted,
    TaskMade,
)
from fallow.journal.v1 import journal_pb2 as pb
from fallow.v1 import certificate_service_pb2, session_pb2
from fallow.wire.enums import CAUSES, DATA_CLASSES, JOB_STATES, TASK_KINDS


def record_from_message(message: certificate_service_pb2.EvidenceRecord) -> RawRecord:
    """The record of a message."""
    return RawRecord(message.sequence, message.at_ms, message.epoch, message.salt, message.event)


def statement_from(data: bytes) -> Statement:
    """The statement in its exact bytes. Raises MALFORMED_MESSAGE."""
    try:
        message = certificate_service_pb2.EvidenceStatement.FromString(data)
    except DecodeError as error:
        raise _malformed("statement", error) from None
    return Statement(
        job_id=message.job_id,
        checkpoint=message.checkpoint,
        records=message.records,
        sequences_digest=message.sequences_digest,
        workers=tuple(
            EvidenceWorker(worker.worker_id, worker.public_key, worker.tier, worker.owner_tag)
            for worker in message.workers
        ),
        sessions={session.sequence: session.session_id for session in message.sessions},
    )


def fact_of(event: bytes) -> Fact | None:
    """What a record says about its job; None for a kind that this version does not know. Raises MALFORMED_MESSAGE."""
    message = _event(event)
    match message.WhichOneof("kind"):
        case "job_submitted":
            return _submitted(message.job_submitted)
        case "job_state_changed":
            moved = message.job_state_changed
            return Moved(JOB_STATES.member(moved.state, "state").value, moved.reason)
        case "job_funded":
            return Funded(message.job_funded.microcredits)
        case "task_created":
            return _task(message.task_created)
        case "lease_granted":
            lease = message.lease_granted
            return Granted(lease.lease_id, lease.task_id, lease.worker_id, lease.session_id, lease.fence)
        case "commitment_recorded":
            return _committed(message.commitment_recorded)
        case "task_settled":
            return _settled(message.task_settled)
        case "task_abandoned":
            ended = message.task_abandoned
            cause = CAUSES.member(ended.cause, "cause").value
            return Abandoned(ended.task_id, ended.cursor, ended.rows, cause, ended.reason)
        case _:
            return None


def commitment_payload(event: bytes, *, fence: int, inline_output: bytes) -> bytes:
    """The bytes that a worker signed, made again from what the journal has of its commitment and its inline block.

    The journal's digest of the exact bytes tells whether they are the same. Raises MALFORMED_MESSAGE.
    """
    message = _event(event).commitment_recorded
    commitment = session_pb2.Commitment(
        lease_id=message.lease_id,
        fence=fence,
        output_root=message.output_root,
        rows=message.rows,
        output=message.output,
        failures=message.failures,
        usage=message.usage,
        execution_class=message.execution_class,
        inline_output=inline_output,
    )
    return session_pb2.WorkerMessage(commitment=commitment).SerializeToString(deterministic=True)


def _event(data: bytes) -> pb.Event:
    try:
        return pb.Event.FromString(data)
    except DecodeError as error:
        raise _malformed("event", error) from None


def _submitted(message: pb.JobSubmitted) -> Submitted:
    return Submitted(
        job_id=message.job_id,
        pool_id=message.pool_id,
        bundle_digest=Digest(message.bundle_digest),
        blocks=tuple(
            DatasetPart(Digest(block.blob.digest), block.blob.length_bytes, block.rows) for block in message.blocks
        ),
        rows=message.rows,
        data_class=DATA_CLASSES.member(message.data_class, "data_class").value,
        title=message.title,
        policy=message.policy,
        assurance=message.options.assurance,
        budget_microcredits=message.held_microcredits,
    )


def _task(message: pb.TaskCreated) -> TaskMade:
    flat = list(message.spans)
    return TaskMade(
        task_id=message.task_id,
        kind=TASK_KINDS.member(message.kind, "kind").value,
        spans=tuple(zip(flat[::2], flat[1::2], strict=False)),
    )


def _committed(message: pb.CommitmentRecorded) -> Committed:
    return Committed(
        lease_id=message.lease_id,
        output_root=Digest(message.output_root),
        rows=message.rows,
        rows_failed=message.rows_failed,
        output_digest=Digest(message.output.digest),
        output_length_bytes=message.output.length_bytes,
        inline=message.inline,
        execution_class=message.execution_class,
        message_digest=Digest(message.message_digest),
        signature=message.signature,
        message_sequence=message.sequence,
    )


def _settled(message: pb.TaskSettled) -> Settled:
    return Settled(
        task_id=message.task_id,
        lease_id=message.lease_id,
        cursor=message.cursor,
        rows=message.rows,
        rows_failed=message.rows_failed,
        microcredits=message.microcredits,
        released=message.released,
        contribution_microcredits=message.contribution_microcredits,
    )


def _malformed(field: str, error: DecodeError) -> FallowError:
    return FallowError(Reason.MALFORMED_MESSAGE, f"the {field} can't be read: {error}", field=field)
