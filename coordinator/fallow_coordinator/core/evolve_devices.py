"""How events about challenges and certificates of devices change the state."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from fallow.challenge import ChallengeKind
from fallow_coordinator.core import events as e
from fallow_coordinator.core.groups import place, unplace
from fallow_coordinator.core.state import Challenge, ChallengeRecord, DeviceCertificate, State

DeviceEvent = e.ChallengeIssued | e.ChallengeAnswered | e.DeviceMeasured | e.DeviceCertificateEnded | e.ChallengeEnded


def evolve_device(state: State, event: DeviceEvent, at_ms: int) -> None:
    """Applies one event about measuring devices."""
    match event:
        case e.ChallengeIssued():
            assert event.task_id not in state.challenges, "a challenge is issued once"
            state.challenges[event.task_id] = Challenge(
                task_id=event.task_id,
                worker_id=event.worker_id,
                device_digest=event.device_digest,
                plan=event.plan,
                issued_at_ms=at_ms,
            )
        case e.ChallengeAnswered():
            challenge = state.challenges[event.task_id]
            assert not challenge.answered, "a challenge is answered once"
            challenge.answered = True
            challenge.units_milli_per_s = event.units_milli_per_s
        case e.DeviceMeasured():
            _measure(state, event, at_ms)
        case e.DeviceCertificateEnded():
            worker = state.workers[event.worker_id]
            unplace(state, worker)
            del worker.certificates[event.device_id]
            place(state, worker)
        case e.ChallengeEnded():
            challenge = state.challenges.pop(event.task_id)
            assert challenge.worker_id == event.worker_id, "a challenge is one worker's"
            challenged = state.workers[event.worker_id].challenged
            before = challenged.get(event.device_id)
            challenged[event.device_id] = ChallengeRecord(
                failures=1 + (before.failures if before is not None else 0),
                retry_at_ms=at_ms + event.retry_after_ms,
                reason=event.reason,
                blamed=event.blamed,
            )
        case _:
            assert_never(event)


def _measure(state: State, event: e.DeviceMeasured, at_ms: int) -> None:
    challenge = state.challenges.pop(event.task_id)
    worker = state.workers[event.worker_id]
    assert challenge.answered and challenge.output is not None, "what is certified was answered and delivered"
    assert challenge.worker_id == event.worker_id, "a challenge is one worker's"
    assert challenge.device_digest == event.device_digest, "the device that was asked is the one certified"
    held = worker.certificates.get(event.device_id)
    if held is None or held.device_digest != event.device_digest:
        held = DeviceCertificate(event.device_id, event.device_digest)
    if event.kind is ChallengeKind.SPEED:
        held = replace(
            held,
            units_milli_per_s=event.units_milli_per_s,
            speed_challenge=event.task_id,
            speed_measured_at_ms=at_ms,
            speed_again_at_ms=event.again_at_ms,
            speed_expires_at_ms=event.expires_at_ms,
        )
    else:
        held = replace(
            held,
            memory_bytes=event.memory_bytes,
            memory_challenge=event.task_id,
            memory_measured_at_ms=at_ms,
            memory_again_at_ms=event.again_at_ms,
            memory_expires_at_ms=event.expires_at_ms,
        )
    unplace(state, worker)
    worker.certificates[event.device_id] = held
    place(state, worker)
    worker.challenged.pop(event.device_id, None)
