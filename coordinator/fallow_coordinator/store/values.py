"""The shared shapes of journal events, domain ↔ protobuf, without any check of limits.

`fallow.wire` has converters of its own for the same messages; those guard a wire and change with its limits. What
stands in the journal was accepted once and must be readable for ever, so these check nothing but that a value is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Generic, TypeVar

from fallow.bundle import InspectionReport, Precision
from fallow.cost import CostCurve, CostKnot
from fallow.ids import Digest
from fallow.job import Footprint, JobOptions, JobState, Objective
from fallow.roles import DataClass, Role, Tier
from fallow.session import (
    BlobReference,
    Capability,
    Cause,
    Device,
    DeviceKind,
    DeviceLevel,
    EnergySource,
    NodeRows,
    RowFailure,
    SandboxLevel,
    TaskKind,
    Usage,
)
from fallow.v1 import blob_pb2, bundle_pb2, capability_pb2, identity_pb2, job_pb2, session_pb2

MemberT = TypeVar("MemberT", bound=StrEnum)
NumberT = TypeVar("NumberT", bound=int)
_MS_PER_SECOND = 1000
_NANOS_PER_MS = 1_000_000


class EnumTable(Generic[MemberT, NumberT]):
    """Members of one enum and their numbers on disk, 0 for none; complete, or importing this module fails."""

    __slots__ = ("_members", "_numbers", "_unspecified")

    def __init__(self, members: type[MemberT], number_of: Callable[[str], NumberT], prefix: str) -> None:
        self._numbers: dict[MemberT, NumberT] = {member: number_of(f"{prefix}_{member.name}") for member in members}
        self._members: dict[int, MemberT] = {number: member for member, number in self._numbers.items()}
        self._unspecified = number_of(f"{prefix}_UNSPECIFIED")

    def number(self, member: MemberT | None) -> NumberT:
        """The number of a member; 0 for None."""
        return self._unspecified if member is None else self._numbers[member]

    def member(self, number: int) -> MemberT:
        """The member of a number. Raises ValueError for one that this software does not know."""
        found = self._members.get(number)
        if found is None:
            raise ValueError(f"an enum value {number} that this software does not know")
        return found

    def member_or_none(self, number: int) -> MemberT | None:
        """The member of a number, None for 0."""
        return None if number == 0 else self.member(number)


ROLES = EnumTable(Role, identity_pb2.Role.Value, "ROLE")
TIERS = EnumTable(Tier, identity_pb2.Tier.Value, "TIER")
DATA_CLASSES = EnumTable(DataClass, job_pb2.DataClass.Value, "DATA_CLASS")
JOB_STATES = EnumTable(JobState, job_pb2.JobState.Value, "JOB_STATE")
OBJECTIVES = EnumTable(Objective, job_pb2.Objective.Value, "OBJECTIVE")
PRECISIONS = EnumTable(Precision, bundle_pb2.Precision.Value, "PRECISION")
TASK_KINDS = EnumTable(TaskKind, session_pb2.TaskKind.Value, "TASK_KIND")
ENERGY_SOURCES = EnumTable(EnergySource, session_pb2.EnergySource.Value, "ENERGY_SOURCE")
CAUSES = EnumTable(Cause, session_pb2.Cause.Value, "CAUSE")
DEVICE_KINDS = EnumTable(DeviceKind, capability_pb2.DeviceKind.Value, "DEVICE_KIND")
DEVICE_LEVELS = EnumTable(DeviceLevel, capability_pb2.DeviceLevel.Value, "DEVICE_LEVEL")
SANDBOX_LEVELS = EnumTable(SandboxLevel, capability_pb2.SandboxLevel.Value, "SANDBOX_LEVEL")


def blob_to_message(blob: BlobReference) -> blob_pb2.BlobReference:
    return blob_pb2.BlobReference(digest=blob.digest, length_bytes=blob.length_bytes)


def blob_from_message(message: blob_pb2.BlobReference) -> BlobReference:
    return BlobReference(Digest(message.digest), message.length_bytes)


def blobs_from_messages(messages: Iterable[blob_pb2.BlobReference]) -> tuple[BlobReference, ...]:
    return tuple([blob_from_message(message) for message in messages])


def failures_to_messages(failures: Iterable[RowFailure]) -> list[session_pb2.RowFailure]:
    return [
        session_pb2.RowFailure(row=failure.row, cause=CAUSES.number(failure.cause), reason=failure.reason)
        for failure in failures
    ]


def failures_from_messages(messages: Iterable[session_pb2.RowFailure]) -> tuple[RowFailure, ...]:
    return tuple([RowFailure(message.row, CAUSES.member(message.cause), message.reason) for message in messages])


def usage_to_message(usage: Usage) -> session_pb2.Usage:
    return session_pb2.Usage(
        wall_microseconds=usage.wall_microseconds,
        cpu_microseconds=usage.cpu_microseconds,
        memory_bytes_peak=usage.memory_bytes_peak,
        energy_joules=usage.energy_joules,
        tokens=usage.tokens,
        node=usage.node,
        energy_source=ENERGY_SOURCES.number(usage.energy_source),
        nodes=[session_pb2.NodeRows(node=run.node, rows=run.rows) for run in usage.nodes],
    )


def usage_from_message(message: session_pb2.Usage) -> Usage:
    return Usage(
        wall_microseconds=message.wall_microseconds,
        cpu_microseconds=message.cpu_microseconds,
        memory_bytes_peak=message.memory_bytes_peak,
        energy_joules=message.energy_joules,
        tokens=message.tokens,
        node=message.node,
        energy_source=ENERGY_SOURCES.member_or_none(message.energy_source),
        nodes=tuple([NodeRows(run.node, run.rows) for run in message.nodes]),
    )


def footprint_to_message(footprint: Footprint) -> job_pb2.Footprint | None:
    if footprint == Footprint():
        return None
    return job_pb2.Footprint(
        millijoules=footprint.millijoules,
        millijoules_measured=footprint.millijoules_measured,
        micrograms=footprint.micrograms,
        millijoules_unplaced=footprint.millijoules_unplaced,
    )


def footprint_from_message(message: job_pb2.Footprint) -> Footprint:
    return Footprint(
        message.millijoules, message.millijoules_measured, message.micrograms, message.millijoules_unplaced
    )


def curve_to_message(curve: CostCurve) -> bundle_pb2.CostCurve:
    return bundle_pb2.CostCurve(
        feature_number=curve.feature_number,
        knots=[bundle_pb2.CostKnot(size=knot.size, unit_nanos=knot.unit_nanos) for knot in curve.knots],
        spread_permille=curve.spread_permille,
        note=curve.note,
    )


def curve_from_message(message: bundle_pb2.CostCurve) -> CostCurve:
    return CostCurve(
        feature_number=message.feature_number,
        knots=tuple([CostKnot(knot.size, knot.unit_nanos) for knot in message.knots]),
        spread_permille=message.spread_permille,
        note=message.note,
    )


def report_to_message(report: InspectionReport) -> bundle_pb2.InspectionReport:
    return bundle_pb2.InspectionReport(
        bundle_digest=report.bundle_digest,
        accepted=report.accepted,
        refusals=report.refusals,
        operators=[bundle_pb2.OperatorCount(operator=name, count=count) for name, count in report.operators],
        canonical_batch_rows=report.canonical_batch_rows,
        slot_dependent=report.slot_dependent,
        neighbour_dependent=report.neighbour_dependent,
        unit_micros_per_row=report.unit_micros_per_row,
        unit_micros_per_kib=report.unit_micros_per_kib,
        memory_bytes_peak=report.memory_bytes_peak,
        execution_class=report.execution_class,
        inspected_seconds=report.inspected_seconds,
        cost=curve_to_message(report.cost) if report.cost is not None else None,
        flops_per_row=report.flops_per_row,
    )


def report_from_message(message: bundle_pb2.InspectionReport) -> InspectionReport:
    return InspectionReport(
        bundle_digest=Digest(message.bundle_digest),
        accepted=message.accepted,
        refusals=tuple(message.refusals),
        operators=tuple([(counted.operator, counted.count) for counted in message.operators]),
        canonical_batch_rows=message.canonical_batch_rows,
        slot_dependent=message.slot_dependent,
        neighbour_dependent=message.neighbour_dependent,
        unit_micros_per_row=message.unit_micros_per_row,
        unit_micros_per_kib=message.unit_micros_per_kib,
        memory_bytes_peak=message.memory_bytes_peak,
        execution_class=message.execution_class,
        inspected_seconds=message.inspected_seconds,
        cost=curve_from_message(message.cost) if message.HasField("cost") else None,
        flops_per_row=message.flops_per_row,
    )


def capability_to_message(capability: Capability) -> capability_pb2.Capability:
    return capability_pb2.Capability(
        devices=[_device_to_message(device) for device in capability.devices],
        sandbox_level=SANDBOX_LEVELS.number(capability.sandbox_level),
        memory_bytes_free=capability.memory_bytes_free,
        executor=capability.executor,
        nodes=capability.nodes,
        operating_system=capability.operating_system,
        region=capability.region,
        on_battery=capability.on_battery,
        network_down_bytes_per_s=capability.network_down_bytes_per_s,
        network_up_bytes_per_s=capability.network_up_bytes_per_s,
        # A set has no order and bytes must not depend on the hash seed.
        task_kinds=sorted(kind.value for kind in capability.task_kinds),
        ask_microcredits_per_unit=capability.ask_microcredits_per_unit,
        network_round_trip_microseconds=capability.network_round_trip_microseconds,
    )


def capability_from_message(message: capability_pb2.Capability) -> Capability:
    return Capability(
        devices=tuple([_device_from_message(device) for device in message.devices]),
        sandbox_level=SANDBOX_LEVELS.member(message.sandbox_level),
        memory_bytes_free=message.memory_bytes_free,
        executor=message.executor,
        nodes=message.nodes,
        operating_system=message.operating_system,
        region=message.region,
        on_battery=message.on_battery,
        network_down_bytes_per_s=message.network_down_bytes_per_s,
        network_up_bytes_per_s=message.network_up_bytes_per_s,
        task_kinds=frozenset([TaskKind(kind) for kind in message.task_kinds]),
        ask_microcredits_per_unit=message.ask_microcredits_per_unit,
        network_round_trip_microseconds=message.network_round_trip_microseconds,
    )


def _device_to_message(device: Device) -> capability_pb2.Device:
    return capability_pb2.Device(
        device_id=device.device_id,
        kind=DEVICE_KINDS.number(device.kind),
        level=DEVICE_LEVELS.number(device.level),
        vendor=device.vendor,
        model=device.model,
        memory_bytes=device.memory_bytes,
        providers=device.providers,
        driver_version=device.driver_version,
        obstacle=device.obstacle,
        cores=device.cores,
        architecture=device.architecture,
        execution_class=device.execution_class,
        slots=device.slots,
        claimed_milliunits_per_s=device.claimed_milliunits_per_s,
    )


def _device_from_message(message: capability_pb2.Device) -> Device:
    return Device(
        device_id=message.device_id,
        kind=DEVICE_KINDS.member(message.kind),
        level=DEVICE_LEVELS.member(message.level),
        vendor=message.vendor,
        model=message.model,
        memory_bytes=message.memory_bytes,
        providers=tuple(message.providers),
        driver_version=message.driver_version,
        obstacle=message.obstacle,
        cores=message.cores,
        architecture=message.architecture,
        execution_class=message.execution_class,
        slots=message.slots,
        claimed_milliunits_per_s=message.claimed_milliunits_per_s,
    )


def options_to_message(options: JobOptions) -> job_pb2.JobOptions:
    message = job_pb2.JobOptions(
        failed_rows_max=options.failed_rows_max,
        precision=PRECISIONS.number(options.precision),
        latency_ms_max=options.latency_ms_max,
        priority=options.priority,
        limit_microcredits_per_unit=options.limit_microcredits_per_unit,
        budget_microcredits=options.budget_microcredits,
        objective=OBJECTIVES.number(options.objective),
        region=options.region,
        device_kind=options.device_kind,
        memory_bytes_min=options.memory_bytes_min,
        assurance=options.assurance,
        all_rows_may_fail=options.all_rows_may_fail,
    )
    if options.deadline_ms:
        seconds, milliseconds = divmod(options.deadline_ms, _MS_PER_SECOND)
        message.deadline.seconds = seconds
        message.deadline.nanos = milliseconds * _NANOS_PER_MS
    if options.retention_ms:
        seconds, milliseconds = divmod(options.retention_ms, _MS_PER_SECOND)
        message.retention.seconds = seconds
        message.retention.nanos = milliseconds * _NANOS_PER_MS
    return message


def options_from_message(message: job_pb2.JobOptions) -> JobOptions:
    return JobOptions(
        failed_rows_max=message.failed_rows_max,
        precision=PRECISIONS.member_or_none(message.precision),
        latency_ms_max=message.latency_ms_max,
        priority=message.priority,
        deadline_ms=message.deadline.seconds * _MS_PER_SECOND + message.deadline.nanos // _NANOS_PER_MS,
        limit_microcredits_per_unit=message.limit_microcredits_per_unit,
        budget_microcredits=message.budget_microcredits,
        objective=OBJECTIVES.member(message.objective),
        region=message.region,
        device_kind=message.device_kind,
        memory_bytes_min=message.memory_bytes_min,
        assurance=message.assurance,
        retention_ms=message.retention.seconds * _MS_PER_SECOND + message.retention.nanos // _NANOS_PER_MS,
        all_rows_may_fail=message.all_rows_may_fail,
    )
