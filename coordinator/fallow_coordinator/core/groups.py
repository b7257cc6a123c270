"""Which workers count where: the indexes by which free windows are found. Only `evolve` calls what changes them."""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import lru_cache

from fallow.ids import LeaseId
from fallow.roles import TIERS_ALLOWED, Tier
from fallow.session import Capability, DeviceLevel, TaskKind
from fallow_coordinator.core.limits import SLOTS_PER_WORKER_MAX
from fallow_coordinator.core.state import ANY_POOL, GroupKey, LaneKey, State, Worker, WorkerGroup

_INSPECTORS = (GroupKey(TaskKind.INSPECT, ANY_POOL, Tier.OPERATOR),)
_TIER_ORDER = (Tier.VOLUNTEER, Tier.MANAGED, Tier.OPERATOR)


def slots_of(capability: Capability) -> int:
    """Tasks that can run side by side: the slots of its usable devices, at least 1."""
    slots = sum(max(1, device.slots) for device in capability.devices if device.level is not DeviceLevel.PRESENT)
    return min(max(1, slots), SLOTS_PER_WORKER_MAX)


def groups_of_worker(worker: Worker) -> tuple[GroupKey, ...]:
    """Where an open, unquarantined worker counts: maps of its pool, and inspections if it is an operator's."""
    groups: list[GroupKey] = []
    if TaskKind.MAP in worker.capability.task_kinds:
        groups.append(GroupKey(TaskKind.MAP, worker.pool_id, worker.tier))
    if worker.tier is Tier.OPERATOR and TaskKind.INSPECT in worker.capability.task_kinds:
        groups.extend(_INSPECTORS)
    if worker.tier is Tier.OPERATOR and TaskKind.CHECK in worker.capability.task_kinds:
        groups.append(GroupKey(TaskKind.CHECK, ANY_POOL, Tier.OPERATOR))
    return tuple(groups)


@lru_cache(maxsize=4_096)
def groups_of_lane(lane: LaneKey) -> tuple[GroupKey, ...]:
    """Which groups may take a lane's tasks, the least trusted first: operators' machines are scarce."""
    if lane.kind is TaskKind.INSPECT:
        return _INSPECTORS
    assert lane.data_class is not None, "a map lane has a data class"
    allowed = TIERS_ALLOWED[lane.data_class]
    return tuple(GroupKey(lane.kind, lane.pool_id, tier) for tier in _TIER_ORDER if tier in allowed)


def place(state: State, worker: Worker) -> None:
    """Counts a connected worker where it belongs now; `unplace` must have been called before its facts changed."""
    if worker.session_id is None or worker.quarantined:
        worker.groups = ()
        return
    worker.groups = groups_of_worker(worker)
    for key in worker.groups:
        group = state.groups.get(key)
        if group is None:
            group = state.groups[key] = WorkerGroup()
        group.members[worker.worker_id] = None
        group.ahead_total += min(worker.slots, worker.window)
        group.window_total += worker.window
        if worker.free:
            insort(group.free, (worker.load, worker.worker_id))
            group.free_total += worker.free


def unplace(state: State, worker: Worker) -> None:
    """Takes a worker out of all counts."""
    for key in worker.groups:
        group = state.groups[key]
        del group.members[worker.worker_id]
        group.ahead_total -= min(worker.slots, worker.window)
        group.window_total -= worker.window
        _forget_free(group, worker)
        if not group.members:
            assert not group.free and not group.free_total and not group.window_total, "counts end at nothing"
            del state.groups[key]
    worker.groups = ()


def hold(state: State, worker: Worker, *, lease_id: LeaseId, unit_micros: int, holds: bool) -> None:
    """A lease comes to a worker (`holds`) or leaves it; the cheap form of `unplace`, change, `place`."""
    for key in worker.groups:
        _forget_free(state.groups[key], worker)
    if holds:
        assert lease_id not in worker.leases, "a lease is granted once"
        worker.leases[lease_id] = None
        worker.unit_micros_held += unit_micros
    else:
        del worker.leases[lease_id]
        worker.unit_micros_held -= unit_micros
    free = worker.free
    if free:
        for key in worker.groups:
            group = state.groups[key]
            insort(group.free, (worker.load, worker.worker_id))
            group.free_total += free


def _forget_free(group: WorkerGroup, worker: Worker) -> None:
    if not worker.free:
        return
    entry = (worker.load, worker.worker_id)
    index = bisect_left(group.free, entry)
    assert group.free[index] == entry, "a free worker stands in its group"
    del group.free[index]
    group.free_total -= worker.free
