"""Challenges and their checks, to protobuf and back."""

from __future__ import annotations

from fallow.challenge import ChallengePlan, ChallengeVerdict, fault_of_plan
from fallow.errors import FallowError, Reason
from fallow.ids import LeaseId
from fallow.session import Checked, DeviceStanding
from fallow.v1 import session_pb2
from fallow.wire.enums import CHALLENGE_KINDS, PRECISIONS
from fallow.wire.moments import moment_from_message, moment_to_message


def plan_to_message(plan: ChallengePlan) -> session_pb2.ChallengePlan:
    """The protobuf form of a plan."""
    return session_pb2.ChallengePlan(
        device_id=plan.device_id,
        kind=CHALLENGE_KINDS.number(plan.kind),
        seed=plan.seed,
        precision=PRECISIONS.number(plan.precision),
        rows=plan.rows,
        inner=plan.inner,
        columns=plan.columns,
        steps=plan.steps,
        fill_bytes=plan.fill_bytes,
        samples=plan.samples,
    )


def plan_from_message(message: session_pb2.ChallengePlan, field: str) -> ChallengePlan:
    """The plan a message describes. Raises FIELD_MISSING, FIELD_INVALID."""
    plan = ChallengePlan(
        device_id=message.device_id,
        kind=CHALLENGE_KINDS.member(message.kind, f"{field}.kind"),
        seed=message.seed,
        precision=PRECISIONS.member(message.precision, f"{field}.precision"),
        rows=message.rows,
        inner=message.inner,
        columns=message.columns,
        steps=message.steps,
        fill_bytes=message.fill_bytes,
        samples=message.samples,
    )
    fault = fault_of_plan(plan)
    if fault:
        raise FallowError(Reason.FIELD_INVALID, f"no challenge asks for {fault}", field=field)
    return plan


def checked_to_message(checked: Checked) -> session_pb2.Checked:
    """The protobuf form of a verdict."""
    return session_pb2.Checked(
        lease_id=checked.lease_id, fence=checked.fence, holds=checked.verdict.holds, reason=checked.verdict.reason
    )


def checked_from_message(message: session_pb2.Checked, lease_id: LeaseId, reason: str) -> Checked:
    """The verdict a message describes, its texts looked at by the caller."""
    return Checked(lease_id, message.fence, ChallengeVerdict(message.holds, reason))


def standing_to_message(standing: DeviceStanding) -> session_pb2.DeviceStanding:
    """The protobuf form of a device's standing."""
    return session_pb2.DeviceStanding(
        device_id=standing.device_id,
        units_milli_per_s=standing.units_milli_per_s,
        memory_bytes=standing.memory_bytes,
        expires_at=moment_to_message(standing.expires_at_ms) if standing.expires_at_ms else None,
        reason=standing.reason,
    )


def standing_from_message(message: session_pb2.DeviceStanding) -> DeviceStanding:
    """The standing a message describes."""
    return DeviceStanding(
        device_id=message.device_id,
        units_milli_per_s=message.units_milli_per_s,
        memory_bytes=message.memory_bytes,
        expires_at_ms=moment_from_message(message.expires_at) if message.HasField("expires_at") else 0,
        reason=message.reason,
    )
