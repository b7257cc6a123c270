"""Decisions about measuring devices: when to challenge, how hard, what an answer and its check are worth."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import islice
from typing import TypeVar

from fallow.challenge import (
    BUNDLE_DIGEST,
    FILL_BLOCK_BYTES,
    FILL_BYTES_MIN,
    REFERENCE_FLOPS_PER_S,
    STEPS_MAX,
    ChallengeKind,
    ChallengePlan,
    speed_milliunits_per_s,
)
from fallow.credits import PoolMode
from fallow.ids import LeaseId, PoolId, TaskId
from fallow.roles import Tier
from fallow.session import Device, DeviceLevel, TaskKind
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.devices import challenge_of, device_of, ended, identity_of, kind_missing, measurable
from fallow_coordinator.core.limits import (
    CERTIFICATE_AGAIN_MS_MIN,
    CERTIFICATE_MEASURED_MS,
    CHALLENGE_RUNTIME_MS,
    CHALLENGE_STEPS_TARGET,
    CHALLENGE_UPLOAD_MS,
    CHALLENGES_LIVE_MAX,
    CHECK_RUNTIME_MS,
    CHECK_WAIT_MS,
    CHECKS_PER_CHALLENGE_MAX,
    CLAIM_MILLI_PER_CORE,
    CLAIM_MILLI_PER_S_MAX,
    CLAIM_SLACK,
    CLAIM_SLACK_UNSTATED,
    FILL_BYTES_PER_MS_MIN,
    FILL_FREE_PART,
    FILL_START_MS,
    ROUND_TRIP_MS_MAX,
    UNIT_MICROS,
    WORKERS_LOOKED_AT_MAX,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.state import Lease, Pool, State, Task, Worker

WatchedT = TypeVar("WatchedT")

_ROWS = 512
_COLUMNS = 512
_INNER_MIN = 2_048
_INNER_MAX = 32_768


# ------------------------------------------------------------------------------------------------- when


def tick(state: State, rules: c.MeasuringRules, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """What is due: certificates end, answers are checked, devices are challenged. One check and one challenge a worker
    at a time, and no more than `CHALLENGES_LIVE_MAX` challenges in all."""
    events = [*_expired(_looked_at(state.workers.values(), names), now_ms), *_checks(state, now_ms, names)]
    busy = {event.worker_id for event in events if isinstance(event, e.LeaseGranted)}
    if not any(worker.window for worker in _checkers(state)):
        return tuple(events)
    challenged = {challenge.worker_id for challenge in state.challenges.values()}
    room = CHALLENGES_LIVE_MAX - len(state.challenges)
    for worker_id in _looked_at(state.sessions.values(), names):
        worker = state.workers[worker_id]
        if room <= 0:
            break
        if (
            worker.worker_id in challenged
            or worker.worker_id in busy
            or not _is_at_leisure(state, worker, rules, now_ms)
        ):
            continue
        due = _due(state, worker, now_ms)
        if due is not None:
            room -= 1
            events += _issue(worker, *due, rules, now_ms, names)
    return tuple(events)


def _looked_at(all_of_them: Collection[WatchedT], names: Names) -> Iterable[WatchedT]:
    """Those whose turn it is in this tick: all, or a part drawn by lot, so that a tick costs the same in a large fleet.

    What is due is due for days or for minutes: it does not matter when in the next minute it is found.
    """
    parts = -(-len(all_of_them) // WORKERS_LOOKED_AT_MAX)
    if parts <= 1:
        return all_of_them
    part = int.from_bytes(names.draw()[:8], "big") % parts
    return islice(all_of_them, part * WORKERS_LOOKED_AT_MAX, (part + 1) * WORKERS_LOOKED_AT_MAX)


def _checkers(state: State) -> list[Worker]:
    """Connected operators' workers that check answers, the least loaded first."""
    able = [
        state.workers[worker_id]
        for group in state.groups.values()
        if group.ability.tier is Tier.OPERATOR and TaskKind.CHECK in group.ability.kinds
        for worker_id in group.members
    ]
    return sorted(able, key=lambda worker: worker.load)


def _is_at_leisure(state: State, worker: Worker, rules: c.MeasuringRules, now_ms: int) -> bool:
    """Whether a challenge would disturb nobody: connected, free, on mains power, and so for a while."""
    if not worker.free_since_ms or not worker.free or worker.capability.on_battery:
        return False
    idle_ms = rules.idle_ms if _is_donation(state.pools[worker.pool_id]) else rules.idle_paid_ms
    return now_ms - worker.free_since_ms >= idle_ms and TaskKind.CHALLENGE in worker.capability.task_kinds


def _is_donation(pool: Pool) -> bool:
    return pool.mode is PoolMode.DONATION


def _due(state: State, worker: Worker, now_ms: int) -> tuple[Device, ChallengeKind] | None:
    """What to measure next of a worker, or nothing."""
    once = _is_donation(state.pools[worker.pool_id])
    for device in measurable(worker):
        record = worker.challenged.get(device.device_id)
        if record is not None and now_ms < record.retry_at_ms:
            continue
        held = worker.certificates.get(device.device_id)
        kind = kind_missing(held)
        if kind is None and held is not None and not once:
            if now_ms >= held.speed_again_at_ms:
                kind = ChallengeKind.SPEED
            elif now_ms >= held.memory_again_at_ms:
                kind = ChallengeKind.MEMORY
        if kind is not None:
            return device, kind
    return None


# ------------------------------------------------------------------------------------------------- how hard


def sized(device: Device, kind: ChallengeKind, rules: c.MeasuringRules, free_bytes: int, seed: bytes) -> ChallengePlan:
    """A plan sized to what the device claims: about `rules.target_ms` of products, or as much memory as can be spared.

    Memory never takes more than one part in `FILL_FREE_PART` of what the machine says is free, nor of the device's own.
    """
    if kind is ChallengeKind.MEMORY:
        spare = min(rules.fill_bytes_max, free_bytes // FILL_FREE_PART, device.memory_bytes // FILL_FREE_PART)
        fill = FILL_BYTES_MIN
        while 2 * fill <= spare:
            fill *= 2
        return ChallengePlan(device.device_id, kind, seed, fill_bytes=fill // FILL_BLOCK_BYTES * FILL_BLOCK_BYTES)
    operations = claim_milli_per_s(device) * REFERENCE_FLOPS_PER_S // 1_000 * rules.target_ms // 1_000
    inner = _INNER_MIN
    while inner < _INNER_MAX and operations > 2 * _ROWS * _COLUMNS * inner * CHALLENGE_STEPS_TARGET:
        inner *= 2
    steps = min(STEPS_MAX, max(1, -(-operations // (2 * _ROWS * _COLUMNS * inner))))
    return ChallengePlan(device.device_id, kind, seed, rows=_ROWS, inner=inner, columns=_COLUMNS, steps=steps)


def claim_milli_per_s(device: Device) -> int:
    """The speed that it says it has, in thousandths of a unit a second; a modest guess when it says nothing."""
    stated = device.claimed_milliunits_per_s
    return min(CLAIM_MILLI_PER_S_MAX, stated or max(1, device.cores) * CLAIM_MILLI_PER_CORE)


def _issue(
    worker: Worker, device: Device, kind: ChallengeKind, rules: c.MeasuringRules, now_ms: int, names: Names
) -> tuple[e.Event, ...]:
    plan = sized(device, kind, rules, worker.capability.memory_bytes_free, names.draw())
    task_id = TaskId(names.new("task"))
    issued = e.ChallengeIssued(
        task_id=task_id, worker_id=worker.worker_id, device_digest=identity_of(device), plan=plan
    )
    created = _task(task_id, TaskKind.CHALLENGE, worker.pool_id, plan.operations)
    return issued, created, _lease(created, worker, CHALLENGE_RUNTIME_MS, now_ms, names)


def _task(
    task_id: TaskId, kind: TaskKind, pool_id: PoolId, operations: int, challenge: TaskId | None = None
) -> e.TaskCreated:
    return e.TaskCreated(
        task_id=task_id,
        kind=kind,
        job_id=None,
        bundle_digest=BUNDLE_DIGEST,
        pool_id=pool_id,
        spans=(),
        unit_micros=operations * UNIT_MICROS // REFERENCE_FLOPS_PER_S,
        challenge_task_id=challenge,
    )


def _lease(task: e.TaskCreated, worker: Worker, runtime_max_ms: int, now_ms: int, names: Names) -> e.LeaseGranted:
    assert worker.session_id is not None, "free workers are connected"
    return e.LeaseGranted(
        lease_id=LeaseId(names.new("lease")),
        task_id=task.task_id,
        worker_id=worker.worker_id,
        session_id=worker.session_id,
        fence=1,
        deadline_ms=now_ms + runtime_max_ms + CHALLENGE_UPLOAD_MS,
        runtime_max_ms=runtime_max_ms,
    )


# ------------------------------------------------------------------------------------------------- answers


def answer_fault(state: State, task: Task, command: c.Commit) -> str:
    """Why a commitment is no answer in time, or nothing."""
    challenge = challenge_of(state, task)
    took_ms = elapsed_ms(command)
    if challenge.plan.kind is ChallengeKind.MEMORY:
        limit_ms = FILL_START_MS + challenge.plan.fill_bytes // FILL_BYTES_PER_MS_MIN
        return "" if took_ms <= limit_ms else f"{took_ms} ms for its memory, allowed are {limit_ms} ms"
    device = device_of(state.workers[challenge.worker_id], challenge.plan.device_id)
    if device is None:
        return ""
    speed = speed_milliunits_per_s(challenge.plan.operations, took_ms)
    stated = bool(device.claimed_milliunits_per_s)
    least = max(1, claim_milli_per_s(device) // (CLAIM_SLACK if stated else CLAIM_SLACK_UNSTATED))
    if speed >= least:
        return ""
    return f"{speed / 1_000:g} units a second, where it claims {claim_milli_per_s(device) / 1_000:g}"


def elapsed_ms(command: c.Commit) -> int:
    """How long an answer took, the shortest round trip taken off, within a limit: a worker could lengthen it."""
    return max(1, command.elapsed_ms - min(command.round_trip_ms, ROUND_TRIP_MS_MAX, command.elapsed_ms // 4))


def answered(state: State, task: Task, command: c.Commit) -> e.ChallengeAnswered:
    """The event of an answer in time."""
    plan = challenge_of(state, task).plan
    took_ms = elapsed_ms(command)
    return e.ChallengeAnswered(
        task_id=task.task_id,
        elapsed_ms=took_ms,
        round_trip_ms=command.round_trip_ms,
        units_milli_per_s=speed_milliunits_per_s(plan.operations, took_ms),
    )


# ------------------------------------------------------------------------------------------------- checks


def _checks(state: State, now_ms: int, names: Names) -> Iterable[e.Event]:
    """Answers go to free operator workers, one each; what nobody checks in time is given up."""
    free = [worker for worker in _checkers(state) if worker.free]
    for challenge in state.challenges.values():
        if challenge.output is None or challenge.check_task_id is not None:
            continue
        if challenge.checks >= CHECKS_PER_CHALLENGE_MAX or now_ms - challenge.issued_at_ms > CHECK_WAIT_MS:
            yield from ended(state, challenge, "nobody could check its answer", blamed=False)
        elif free:
            checker = free.pop(0)
            created = _task(TaskId(names.new("task")), TaskKind.CHECK, checker.pool_id, 0, challenge=challenge.task_id)
            yield created
            yield _lease(created, checker, CHECK_RUNTIME_MS, now_ms, names)


def checked(
    state: State, command: c.ReportCheck, lease: Lease, task: Task, now_ms: int, names: Names
) -> tuple[e.Event, ...]:
    """What follows from a verdict: a certificate, or an end. The check's own task is settled by the caller."""
    challenge = challenge_of(state, task)
    worker = state.workers[challenge.worker_id]
    device = device_of(worker, challenge.plan.device_id)
    if not command.verdict.holds:
        return ended(state, challenge, f"its answer is wrong: {command.verdict.reason}", blamed=True)
    if device is None or identity_of(device) != challenge.device_digest:
        return ended(state, challenge, "the device has changed since", blamed=False)
    assert challenge.output is not None, "only delivered answers are checked"
    spread_ms = CERTIFICATE_MEASURED_MS - CERTIFICATE_AGAIN_MS_MIN
    again_at_ms = now_ms + CERTIFICATE_AGAIN_MS_MIN + int.from_bytes(names.draw()[:8], "big") % spread_ms
    measured = e.DeviceMeasured(
        task_id=challenge.task_id,
        checked_by=lease.worker_id,
        check_lease_id=lease.lease_id,
        worker_id=challenge.worker_id,
        device_id=device.device_id,
        device_digest=challenge.device_digest,
        kind=challenge.plan.kind,
        units_milli_per_s=challenge.units_milli_per_s,
        memory_bytes=challenge.plan.fill_bytes,
        again_at_ms=again_at_ms,
        expires_at_ms=now_ms + CERTIFICATE_MEASURED_MS,
        answer=challenge.output.digest,
    )
    return (measured,)


# ------------------------------------------------------------------------------------------------- certificates


def _expired(workers: Iterable[Worker], now_ms: int) -> Iterable[e.Event]:
    for worker in workers:
        for held in worker.certificates.values():
            if held.expires_at_ms <= now_ms:
                yield e.DeviceCertificateEnded(worker.worker_id, held.device_id, "it has expired")


def outlived(worker: Worker, devices: tuple[Device, ...]) -> tuple[e.Event, ...]:
    """Certificates that end because the worker's devices are these now."""
    now = {device.device_id: identity_of(device) for device in devices if device.level is not DeviceLevel.PRESENT}
    return tuple(
        e.DeviceCertificateEnded(worker.worker_id, held.device_id, "the device is another one now")
        for held in worker.certificates.values()
        if now.get(held.device_id) != held.device_digest
    )
