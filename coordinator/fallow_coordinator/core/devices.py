"""What is known of a worker's devices by measuring them: who is measured, how fast, and which device it was."""

from __future__ import annotations

import hashlib

from fallow.challenge import ChallengeKind
from fallow.ids import Digest
from fallow.limits import GIB
from fallow.session import Device, DeviceLevel
from fallow_coordinator.core import events as e
from fallow_coordinator.core.limits import (
    CHALLENGE_RETRY_BLAMED_MS_MAX,
    CHALLENGE_RETRY_BLAMED_MS_MIN,
    CHALLENGE_RETRY_MS_MAX,
    CHALLENGE_RETRY_MS_MIN,
)
from fallow_coordinator.core.state import Challenge, DeviceCertificate, State, Task, Worker


def measured(worker: Worker) -> bool:
    """Whether any device of the worker has shown its speed and its memory: only then may it be given paid work."""
    return any(certificate.complete for certificate in worker.certificates.values())


def speed_measured(worker: Worker) -> int:
    """Speed of all its measured devices together, in thousandths of a unit a second; 0 when none is measured."""
    return sum(held.units_milli_per_s for held in worker.certificates.values() if held.complete)


def certificate_of(worker: Worker, device_id: str) -> DeviceCertificate | None:
    """The device's certificate when both its speed and its memory have been shown."""
    held = worker.certificates.get(device_id)
    return held if held is not None and held.complete else None


def identity_of(device: Device) -> Digest:
    """What makes it this device and no other: model, memory, driver, runtime and execution class; not its name.

    Memory counts in GiB: what firmware keeps for itself changes with updates.
    """
    parts = (
        device.kind.value,
        device.vendor,
        device.model,
        f"{device.memory_bytes // GIB} GiB",
        f"{device.cores} cores",
        device.architecture,
        device.driver_version,
        device.execution_class,
        *device.providers,
    )
    text = b"".join(len(part.encode()).to_bytes(4, "big") + part.encode() for part in parts)
    return Digest(hashlib.sha256(text).digest())


def measurable(worker: Worker) -> tuple[Device, ...]:
    """Its devices that work and can be challenged."""
    return tuple(device for device in worker.capability.devices if device.level is not DeviceLevel.PRESENT)


def device_of(worker: Worker, device_id: str) -> Device | None:
    """The worker's usable device of this name."""
    return next((device for device in measurable(worker) if device.device_id == device_id), None)


def challenge_of(state: State, task: Task) -> Challenge:
    """What a task of kind challenge or check is about."""
    return state.challenges[task.challenge_task_id if task.challenge_task_id is not None else task.task_id]


def kind_missing(held: DeviceCertificate | None) -> ChallengeKind | None:
    """What a device has not shown yet: first its speed, then its memory."""
    if held is None or not held.units_milli_per_s:
        return ChallengeKind.SPEED
    return None if held.memory_bytes else ChallengeKind.MEMORY


def ended(state: State, challenge: Challenge, reason: str, *, blamed: bool) -> tuple[e.Event, ...]:
    """A challenge that came to nothing; whoever is to blame for it loses the certificate that it had."""
    worker = state.workers[challenge.worker_id]
    device_id = challenge.plan.device_id
    record = worker.challenged.get(device_id)
    failures = record.failures if record is not None else 0
    first, most = CHALLENGE_RETRY_MS_MIN, CHALLENGE_RETRY_MS_MAX
    if blamed:
        first, most = CHALLENGE_RETRY_BLAMED_MS_MIN, CHALLENGE_RETRY_BLAMED_MS_MAX
    over = e.ChallengeEnded(
        task_id=challenge.task_id,
        worker_id=challenge.worker_id,
        device_id=device_id,
        blamed=blamed,
        reason=reason,
        retry_after_ms=min(most, first << min(failures, 20)),
    )
    if blamed and device_id in worker.certificates:
        return over, e.DeviceCertificateEnded(challenge.worker_id, device_id, f"a challenge failed: {reason}")
    return (over,)
