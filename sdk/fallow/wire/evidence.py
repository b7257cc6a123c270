"""Evidence ↔ protobuf: the records of a job, as facts, and the statement that goes with them."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from fallow.errors import FallowError, Reason
from fallow.ids import Digest
from fallow.job_records import (
    Abandoned,
    Accepted,
    CheckedRow,
    Committed,
    Compared,
    Corrected,
    DatasetPart,
    Distrusted,
    Drawn,
    EvidenceWorker,
    Fact,
    Funded,
    GivenUp,
    Granted,
    Judged,
    Moved,
    RawRecord,
    Released,
    Reported,
    SecretSet,
    Settled,
    Statement,
    Submitted,
    TaskMade,
    Voided,
)
from fallow.journal.v1 import journal_pb2 as pb
from fallow.v1 import certificate_service_pb2, session_pb2
from fallow.wire.enums import CAUSES, DATA_CLASSES, FINDINGS, JOB_STATES, TASK_KINDS


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
        case "late_lease_settled":
            late = message.late_lease_settled
            return Settled(
                late.task_id,
                late.lease_id,
                cursor=0,
                rows=late.rows,
                rows_failed=late.rows_failed,
                microcredits=late.microcredits,
                released=late.released,
                contribution_microcredits=late.contribution_microcredits,
            )
        case "task_abandoned":
            ended = message.task_abandoned
            cause = CAUSES.member(ended.cause, "cause").value
            return Abandoned(ended.task_id, ended.cursor, ended.rows, cause, ended.reason)
        case _:
            return _verification_fact(message)


def _verification_fact(message: pb.Event) -> Fact | None:
    match message.WhichOneof("kind"):
        case "draw_secret_set":
            return SecretSet(message.draw_secret_set.secret)
        case "audits_drawn":
            return _drawn(message.audits_drawn)
        case "audit_compared":
            found = message.audit_compared
            return Compared(found.task_id, found.lease_id, found.worker_id, tuple(found.equal))
        case "audit_given_up":
            return GivenUp(message.audit_given_up.reason)
        case "referee_reported":
            return _reported(message.referee_reported)
        case "verdict_reached":
            told = message.verdict_reached
            verdict = _name(pb.Verdict, told.verdict, "VERDICT_")
            return Judged(told.lease_id, told.row, told.worker_id, verdict, told.referee_lease_id)
        case "rows_corrected":
            return _corrected(message.rows_corrected)
        case "evidence_released":
            released = message.evidence_released
            return Released(released.lease_id, released.worker_id, released.microcredits, released.accepted)
        case "pay_voided":
            return Voided(message.pay_voided.worker_id, message.pay_voided.microcredits)
        case "worker_distrusted":
            ended = message.worker_distrusted
            return Distrusted(ended.worker_id, ended.lease_id, ended.row, ended.reason)
        case "assurance_accepted":
            return Accepted()
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
        checks=tuple(CheckedRow(row.lease_id, row.row) for row in message.checks),
        corrects=message.corrects,
    )


def _drawn(message: pb.AuditsDrawn) -> Drawn:
    return Drawn(
        lease_id=message.lease_id,
        worker_id=message.worker_id,
        cursor=message.cursor,
        rows=message.rows,
        rate_ppm=message.rate_ppm,
        drawn=tuple(message.drawn),
        refereed=tuple(message.refereed),
        trust=_name(pb.Trust, message.trust, "TRUST_"),
    )


def _reported(message: pb.RefereeReported) -> Reported:
    return Reported(
        task_id=message.task_id,
        lease_id=message.lease_id,
        worker_id=message.worker_id,
        own_root=Digest(message.own_root),
        execution_class=message.execution_class,
        findings=tuple(
            tuple("" if not one.finding else FINDINGS.member(one.finding, "finding").value for one in found.candidates)
            for found in message.findings
        ),
        message_digest=Digest(message.message_digest),
        signature=message.signature,
        message_sequence=message.sequence,
    )


def _corrected(message: pb.RowsCorrected) -> Corrected:
    flat = list(message.spans)
    return Corrected(
        lease_id=message.lease_id,
        cursor=message.cursor,
        spans=tuple(zip(flat[::2], flat[1::2], strict=False)),
        rows_failed=message.rows_failed,
        verdict=_name(pb.Verdict, message.verdict, "VERDICT_"),
        reason=message.reason,
    )


# Generated enum wrappers have no type in common.
def _name(kind: Any, number: int, prefix: str) -> str:
    """A journal's enumeration as people write it: `proven-wrong`. Raises MALFORMED_MESSAGE for an unknown number."""
    try:
        name = str(kind.Name(number))
    except ValueError as error:
        raise FallowError(Reason.MALFORMED_MESSAGE, f"the journal says {error}", field="event") from None
    return name.removeprefix(prefix).lower().replace("_", "-")


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
