"""Enumerations to protobuf numbers and back, one table each, complete by construction."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Generic, TypeVar

from fallow.bundle import Precision, ProgramFormat
from fallow.challenge import ChallengeKind
from fallow.comparison import Finding
from fallow.errors import FallowError, Reason
from fallow.job import JobState, Objective
from fallow.roles import DataClass, Role, Tier
from fallow.session import Cause, DeviceKind, DeviceLevel, EnergySource, SandboxLevel, TaskKind
from fallow.v1 import bundle_pb2, capability_pb2, identity_pb2, job_pb2, session_pb2

Value = TypeVar("Value", bound=StrEnum)


class EnumTable(Generic[Value]):
    """Both directions of one enumeration. A member without a number fails at import."""

    # `wire` is a generated enum wrapper; its type differs for each enum and carries no common protocol.
    def __init__(self, domain: type[Value], wire: Any, prefix: str) -> None:
        self._numbers: dict[Value, int] = {member: int(wire.Value(f"{prefix}_{member.name}")) for member in domain}
        self._members: dict[int, Value] = {number: member for member, number in self._numbers.items()}
        self._name = domain.__name__

    def number(self, member: Value | None) -> Any:
        """The wire number; 0 (unspecified) for None."""
        return 0 if member is None else self._numbers[member]

    def member(self, number: int, field: str) -> Value:
        """The member. Raises FIELD_MISSING for 0 and FIELD_INVALID for a number this version does not know."""
        if number == 0:
            raise FallowError(Reason.FIELD_MISSING, f"{field} is not set", field=field, limit=self._allowed())
        found = self._members.get(number)
        if found is None:
            raise FallowError(
                Reason.FIELD_INVALID, f"{number} is no {self._name} known here", field=field, limit=self._allowed()
            )
        return found

    def optional(self, number: int, field: str) -> Value | None:
        """As `member`, with None for 0."""
        return None if number == 0 else self.member(number, field)

    def _allowed(self) -> str:
        return ", ".join(member.value for member in self._numbers)


ROLES = EnumTable(Role, identity_pb2.Role, "ROLE")
TIERS = EnumTable(Tier, identity_pb2.Tier, "TIER")
PRECISIONS = EnumTable(Precision, bundle_pb2.Precision, "PRECISION")
PROGRAM_FORMATS = EnumTable(ProgramFormat, bundle_pb2.ProgramFormat, "PROGRAM_FORMAT")
TASK_KINDS = EnumTable(TaskKind, session_pb2.TaskKind, "TASK_KIND")
ENERGY_SOURCES = EnumTable(EnergySource, session_pb2.EnergySource, "ENERGY_SOURCE")
CAUSES = EnumTable(Cause, session_pb2.Cause, "CAUSE")
CHALLENGE_KINDS = EnumTable(ChallengeKind, session_pb2.ChallengeKind, "CHALLENGE_KIND")
FINDINGS = EnumTable(Finding, session_pb2.Finding, "FINDING")
DEVICE_KINDS = EnumTable(DeviceKind, capability_pb2.DeviceKind, "DEVICE_KIND")
DEVICE_LEVELS = EnumTable(DeviceLevel, capability_pb2.DeviceLevel, "DEVICE_LEVEL")
SANDBOX_LEVELS = EnumTable(SandboxLevel, capability_pb2.SandboxLevel, "SANDBOX_LEVEL")
DATA_CLASSES = EnumTable(DataClass, job_pb2.DataClass, "DATA_CLASS")
JOB_STATES = EnumTable(JobState, job_pb2.JobState, "JOB_STATE")
OBJECTIVES = EnumTable(Objective, job_pb2.Objective, "OBJECTIVE")
