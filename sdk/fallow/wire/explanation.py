"""Explanations to protobuf and back."""

from __future__ import annotations

from collections.abc import Iterable

from fallow.explanation import JobExplanation, Obstacle, WorkerExplanation
from fallow.ids import JobId, PartyId
from fallow.v1 import explanation_pb2 as pb
from fallow.wire.enums import JOB_STATES


def job_explanation_to_message(told: JobExplanation) -> pb.JobExplanation:
    """The protobuf form of why a job waits."""
    return pb.JobExplanation(
        job_id=told.job_id,
        state=JOB_STATES.number(told.state),
        workers_considered=told.workers_considered,
        workers_fitting=told.workers_fitting,
        workers_free=told.workers_free,
        fallen_out=_to_messages(told.fallen_out),
        waits_for=_to_messages(told.waits_for),
        accounts_before=told.accounts_before,
        jobs_before=told.jobs_before,
        usage_units=told.usage_units,
    )


def job_explanation_from_message(message: pb.JobExplanation) -> JobExplanation:
    """Why a job waits, as a message says it. Raises FIELD_INVALID."""
    return JobExplanation(
        job_id=JobId(message.job_id),
        state=JOB_STATES.member(message.state, "explanation.state"),
        workers_considered=message.workers_considered,
        workers_fitting=message.workers_fitting,
        workers_free=message.workers_free,
        fallen_out=_from_messages(message.fallen_out),
        waits_for=_from_messages(message.waits_for),
        accounts_before=message.accounts_before,
        jobs_before=message.jobs_before,
        usage_units=message.usage_units,
    )


def worker_explanation_to_message(told: WorkerExplanation) -> pb.WorkerExplanation:
    """The protobuf form of why a worker has no work."""
    return pb.WorkerExplanation(
        worker_id=told.worker_id,
        connected=told.connected,
        leases=told.leases,
        window=told.window,
        room=told.room,
        strikes=told.strikes,
        jobs_considered=told.jobs_considered,
        jobs_fitting=told.jobs_fitting,
        fallen_out=_to_messages(told.fallen_out),
        reasons=_to_messages(told.reasons),
    )


def worker_explanation_from_message(message: pb.WorkerExplanation) -> WorkerExplanation:
    """Why a worker has no work, as a message says it."""
    return WorkerExplanation(
        worker_id=PartyId(message.worker_id),
        connected=message.connected,
        leases=message.leases,
        window=message.window,
        room=message.room,
        strikes=message.strikes,
        jobs_considered=message.jobs_considered,
        jobs_fitting=message.jobs_fitting,
        fallen_out=_from_messages(message.fallen_out),
        reasons=_from_messages(message.reasons),
    )


def _to_messages(obstacles: Iterable[Obstacle]) -> list[pb.Obstacle]:
    return [pb.Obstacle(code=o.code, count=o.count, words=o.words, advice=o.advice) for o in obstacles]


def _from_messages(messages: Iterable[pb.Obstacle]) -> tuple[Obstacle, ...]:
    return tuple(Obstacle(m.code, m.count, m.words, m.advice) for m in messages)
