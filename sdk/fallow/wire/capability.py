"""What a worker says of itself, to protobuf and back."""

from __future__ import annotations

from fallow.errors import FallowError, Reason
from fallow.ids import DeviceId
from fallow.limits import CAPABILITY_BYTES_MAX
from fallow.session import Capability, Device, TaskKind
from fallow.v1 import capability_pb2
from fallow.wire.enums import DEVICE_KINDS, DEVICE_LEVELS, SANDBOX_LEVELS

DEVICES_MAX = 64


def capability_to_message(capability: Capability) -> capability_pb2.Capability:
    """The protobuf form of a capability."""
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
        task_kinds=sorted(kind.value for kind in capability.task_kinds),
        ask_microcredits_per_unit=capability.ask_microcredits_per_unit,
        network_round_trip_microseconds=capability.network_round_trip_microseconds,
    )


def capability_from_message(message: capability_pb2.Capability) -> Capability:
    """The capability a message describes; unknown task kinds are left out. Raises FIELD_INVALID, LIMIT_EXCEEDED."""
    if len(message.devices) > DEVICES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"{len(message.devices)} devices",
            field="capability.devices",
            limit=f"{DEVICES_MAX} devices",
        )
    if message.ByteSize() > CAPABILITY_BYTES_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"a capability of {message.ByteSize()} bytes",
            field="capability",
            limit=f"{CAPABILITY_BYTES_MAX} bytes",
        )
    known = {kind.value: kind for kind in TaskKind}
    return Capability(
        devices=tuple(_device_from_message(d, f"capability.devices[{i}]") for i, d in enumerate(message.devices)),
        sandbox_level=SANDBOX_LEVELS.member(message.sandbox_level, "capability.sandbox_level"),
        memory_bytes_free=message.memory_bytes_free,
        executor=message.executor,
        nodes=message.nodes,
        operating_system=message.operating_system,
        region=message.region,
        on_battery=message.on_battery,
        network_down_bytes_per_s=message.network_down_bytes_per_s,
        network_up_bytes_per_s=message.network_up_bytes_per_s,
        task_kinds=frozenset(known[name] for name in message.task_kinds if name in known),
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


def _device_from_message(message: capability_pb2.Device, field: str) -> Device:
    return Device(
        device_id=DeviceId(message.device_id),
        kind=DEVICE_KINDS.member(message.kind, f"{field}.kind"),
        level=DEVICE_LEVELS.member(message.level, f"{field}.level"),
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
