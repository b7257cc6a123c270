"""Challenges and certificates of devices: their events ↔ protobuf."""

from __future__ import annotations

from fallow.challenge import ChallengeKind, ChallengePlan
from fallow.ids import Digest, LeaseId, PartyId, TaskId
from fallow.journal.v1 import journal_pb2 as pb
from fallow.v1 import session_pb2
from fallow_coordinator.core import events as ev
from fallow_coordinator.store import values
from fallow_coordinator.store.event_kind import AnyKind, Kind

_CHALLENGE_KINDS = values.EnumTable(ChallengeKind, session_pb2.ChallengeKind.Value, "CHALLENGE_KIND")


def _plan_to_message(plan: ChallengePlan) -> session_pb2.ChallengePlan:
    return session_pb2.ChallengePlan(
        device_id=plan.device_id,
        kind=_CHALLENGE_KINDS.number(plan.kind),
        seed=plan.seed,
        precision=values.PRECISIONS.number(plan.precision),
        rows=plan.rows,
        inner=plan.inner,
        columns=plan.columns,
        steps=plan.steps,
        fill_bytes=plan.fill_bytes,
        samples=plan.samples,
    )


def _plan_from_message(message: session_pb2.ChallengePlan) -> ChallengePlan:
    return ChallengePlan(
        device_id=message.device_id,
        kind=_CHALLENGE_KINDS.member(message.kind),
        seed=message.seed,
        precision=values.PRECISIONS.member(message.precision),
        rows=message.rows,
        inner=message.inner,
        columns=message.columns,
        steps=message.steps,
        fill_bytes=message.fill_bytes,
        samples=message.samples,
    )


def _device_measured_to(event: ev.DeviceMeasured) -> pb.DeviceMeasured:
    return pb.DeviceMeasured(
        task_id=event.task_id,
        checked_by=event.checked_by,
        check_lease_id=event.check_lease_id,
        worker_id=event.worker_id,
        device_id=event.device_id,
        device_digest=event.device_digest,
        kind=_CHALLENGE_KINDS.number(event.kind),
        units_milli_per_s=event.units_milli_per_s,
        memory_bytes=event.memory_bytes,
        again_at_ms=event.again_at_ms,
        expires_at_ms=event.expires_at_ms,
        answer=event.answer,
    )


def _device_measured_from(message: pb.DeviceMeasured) -> ev.DeviceMeasured:
    return ev.DeviceMeasured(
        task_id=TaskId(message.task_id),
        checked_by=PartyId(message.checked_by),
        check_lease_id=LeaseId(message.check_lease_id),
        worker_id=PartyId(message.worker_id),
        device_id=message.device_id,
        device_digest=Digest(message.device_digest),
        kind=_CHALLENGE_KINDS.member(message.kind),
        units_milli_per_s=message.units_milli_per_s,
        memory_bytes=message.memory_bytes,
        again_at_ms=message.again_at_ms,
        expires_at_ms=message.expires_at_ms,
        answer=Digest(message.answer),
    )


KINDS: tuple[AnyKind, ...] = (
    Kind(
        "challenge_issued",
        ev.ChallengeIssued,
        lambda event: pb.ChallengeIssued(
            task_id=event.task_id,
            worker_id=event.worker_id,
            device_digest=event.device_digest,
            plan=_plan_to_message(event.plan),
        ),
        lambda message: ev.ChallengeIssued(
            task_id=TaskId(message.task_id),
            worker_id=PartyId(message.worker_id),
            device_digest=Digest(message.device_digest),
            plan=_plan_from_message(message.plan),
        ),
    ),
    Kind(
        "challenge_answered",
        ev.ChallengeAnswered,
        lambda event: pb.ChallengeAnswered(
            task_id=event.task_id,
            elapsed_ms=event.elapsed_ms,
            round_trip_ms=event.round_trip_ms,
            units_milli_per_s=event.units_milli_per_s,
        ),
        lambda message: ev.ChallengeAnswered(
            task_id=TaskId(message.task_id),
            elapsed_ms=message.elapsed_ms,
            round_trip_ms=message.round_trip_ms,
            units_milli_per_s=message.units_milli_per_s,
        ),
    ),
    Kind("device_measured", ev.DeviceMeasured, _device_measured_to, _device_measured_from),
    Kind(
        "device_certificate_ended",
        ev.DeviceCertificateEnded,
        lambda event: pb.DeviceCertificateEnded(
            worker_id=event.worker_id, device_id=event.device_id, reason=event.reason
        ),
        lambda message: ev.DeviceCertificateEnded(PartyId(message.worker_id), message.device_id, message.reason),
    ),
    Kind(
        "challenge_ended",
        ev.ChallengeEnded,
        lambda event: pb.ChallengeEnded(
            task_id=event.task_id,
            worker_id=event.worker_id,
            device_id=event.device_id,
            blamed=event.blamed,
            reason=event.reason,
            retry_after_ms=event.retry_after_ms,
        ),
        lambda message: ev.ChallengeEnded(
            task_id=TaskId(message.task_id),
            worker_id=PartyId(message.worker_id),
            device_id=message.device_id,
            blamed=message.blamed,
            reason=message.reason,
            retry_after_ms=message.retry_after_ms,
        ),
    ),
)
