"""Which workers count where: the indexes by which free windows are found. Only `evolve` calls what changes them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from fallow.credits import PoolMode
from fallow.ids import AccountId, Digest, LeaseId, PartyId
from fallow.roles import Tier
from fallow.session import Capability, DeviceLevel
from fallow_coordinator.core.devices import measured
from fallow_coordinator.core.limits import BUNDLES_PER_WORKER_MAX, SLOTS_PER_WORKER_MAX, UNIT_MICROS
from fallow_coordinator.core.needs import Ability, Needs, ability_of, misfit
from fallow_coordinator.core.state import NO_GROUP, Account, Lane, State, Worker, WorkerGroup


def slots_of(capability: Capability) -> int:
    """Tasks that can run side by side: the slots of its usable devices, at least 1."""
    slots = sum(max(1, device.slots) for device in capability.devices if device.level is not DeviceLevel.PRESENT)
    return min(max(1, slots), SLOTS_PER_WORKER_MAX)


def ability_of_worker(state: State, worker: Worker) -> Ability:
    """What the worker offers now, connected or not."""
    return ability_of(
        worker.capability,
        pool_id=worker.pool_id,
        tier=worker.tier,
        mode=state.pools[worker.pool_id].mode,
        measured=measured(worker),
        distrusted=bool(worker.distrusted_reason),
    )


def fits(needs: Needs, lane: Lane, group: WorkerGroup) -> bool:
    """Whether a lane's work may go to a group now: it can do it, and stands in no region that is closed to it."""
    return group.ability.region not in lane.regions_closed and misfit(needs, group.ability) is None


def numbers_in(groups: int) -> Iterator[int]:
    """The numbers whose bits are set, rising."""
    while groups:
        lowest = groups & -groups
        yield lowest.bit_length() - 1
        groups ^= lowest


def groups_of_lane(state: State, lane: Lane) -> Iterator[WorkerGroup]:
    """The groups whose workers fit a lane."""
    return (state.groups[number] for number in numbers_in(lane.groups))


def place(state: State, worker: Worker) -> None:
    """Counts a connected worker where it belongs now; `unplace` must have been called before its facts changed."""
    assert worker.group == NO_GROUP, "a worker is counted once"
    if worker.session_id is None or worker.quarantined:
        return
    market = state.pools[worker.pool_id].mode is PoolMode.MARKET
    worker.ask_microcredits_per_unit = worker.capability.ask_microcredits_per_unit if market else 0
    group = _group_of(state, ability_of_worker(state, worker))
    worker.group = group.number
    group.members[worker.worker_id] = None
    room = worker.room
    group.window_total += room
    group.ahead_total += min(worker.slots, room)
    if room:
        insort(group.asks, worker.ask_microcredits_per_unit)
        _widen_lanes(state, group, room)
    account = state.accounts[worker.account_id]
    if worker.tier is not Tier.OPERATOR:
        account.own_workers[worker.worker_id] = None
        account.own_ahead += min(worker.slots, room)
    _remember_free(state, group, worker)
    note_own(state, account)


def unplace(state: State, worker: Worker) -> None:
    """Takes a worker out of all counts."""
    if worker.group == NO_GROUP:
        return
    group = state.groups[worker.group]
    _forget_free(state, group, worker)
    del group.members[worker.worker_id]
    room = worker.room
    group.window_total -= room
    group.ahead_total -= min(worker.slots, room)
    if room:
        del group.asks[bisect_left(group.asks, worker.ask_microcredits_per_unit)]
        _widen_lanes(state, group, -room)
    account = state.accounts[worker.account_id]
    if worker.tier is not Tier.OPERATOR:
        del account.own_workers[worker.worker_id]
        account.own_ahead -= min(worker.slots, room)
    worker.group = NO_GROUP
    note(state, group)
    note_own(state, account)


def hold(state: State, worker: Worker, *, lease_id: LeaseId, unit_micros: int, holds: bool) -> None:
    """A lease comes to a worker (`holds`) or leaves it; the cheap form of `unplace`, change, `place`."""
    group = state.groups[worker.group] if worker.group != NO_GROUP else None
    if group is not None:
        _forget_free(state, group, worker)
    if holds:
        assert lease_id not in worker.leases, "a lease is granted once"
        worker.leases[lease_id] = None
        worker.unit_micros_held += unit_micros
    else:
        del worker.leases[lease_id]
        worker.unit_micros_held -= unit_micros
    if group is not None:
        _remember_free(state, group, worker)


def learns_speed(state: State, worker: Worker, bundle_digest: Digest, speed_milliunits_per_s: int) -> None:
    """The worker's speed with a bundle is so much from here on; 0: unchanged."""
    if not speed_milliunits_per_s:
        return
    group = state.groups[worker.group] if worker.group != NO_GROUP else None
    if group is not None:
        _forget_free(state, group, worker)
    worker.speeds.pop(bundle_digest, None)
    worker.speeds[bundle_digest] = speed_milliunits_per_s
    if len(worker.speeds) > BUNDLES_PER_WORKER_MAX:
        del worker.speeds[next(iter(worker.speeds))]
    known = worker.speed_milliunits_per_s
    worker.speed_milliunits_per_s = (3 * known + speed_milliunits_per_s) // 4 if known else speed_milliunits_per_s
    if group is not None:
        _remember_free(state, group, worker)


def note(state: State, group: WorkerGroup) -> None:
    """Says again whether the group has free windows and wants tasks packed; a group of nothing goes."""
    bit = 1 << group.number
    state.free_groups = state.free_groups | bit if group.free_total else state.free_groups & ~bit
    hungry = group.packing < group.free_total
    state.hungry_groups = state.hungry_groups | bit if hungry else state.hungry_groups & ~bit
    wanting = group.stock < group.free_total + group.ahead_total
    state.wanting_groups = state.wanting_groups | bit if wanting else state.wanting_groups & ~bit
    if not group.members and not group.stock:
        assert not group.cheapest and not group.free_total and not group.window_total, "counts end at nothing"
        for lane in state.lanes.values():
            lane.groups &= ~bit
        del state.groups[group.number]
        del state.group_numbers[group.ability]


def note_own(state: State, account: Account) -> None:
    """Says again whether the account's own workers can be served with its own work."""
    _mark(state.own_ready, account, bool(account.ready and account.own_free))
    _mark(state.own_wanting, account, bool(account.lanes) and account.stock < account.own_ahead)


def duration_of_next_unit(worker: Worker) -> int:
    """Microseconds until the worker would have done one unit more than it holds."""
    micros = worker.unit_micros_held // worker.slots + UNIT_MICROS
    return micros * 1_000 // (worker.speed_milliunits_per_s or 1_000)


def _mark(index: dict[AccountId, None], account: Account, holds: bool) -> None:
    if holds:
        index[account.account_id] = None
    else:
        index.pop(account.account_id, None)


def _group_of(state: State, ability: Ability) -> WorkerGroup:
    number = state.group_numbers.get(ability)
    if number is not None:
        return state.groups[number]
    number = 0
    while number in state.groups:
        number += 1
    group = state.groups[number] = WorkerGroup(number, ability)
    state.group_numbers[ability] = number
    for needs, lane in state.lanes.items():
        if fits(needs, lane, group):
            lane.groups |= 1 << number
    return group


def _widen_lanes(state: State, group: WorkerGroup, room: int) -> None:
    bit = 1 << group.number
    for lane in state.lanes.values():
        if lane.groups & bit:
            lane.window_total += room


def _remember_free(state: State, group: WorkerGroup, worker: Worker) -> None:
    free = worker.free
    if free:
        insort(group.cheapest, (worker.ask_microcredits_per_unit, worker.load, worker.worker_id))
        insort(group.fastest, (duration_of_next_unit(worker), worker.ask_microcredits_per_unit, worker.worker_id))
        group.free_total += free
        if worker.tier is not Tier.OPERATOR:
            account = state.accounts[worker.account_id]
            account.own_free[worker.worker_id] = None
            if account.ready:
                state.own_ready[account.account_id] = None
    note(state, group)


def _forget_free(state: State, group: WorkerGroup, worker: Worker) -> None:
    free = worker.free
    if not free:
        return
    _take(group.cheapest, (worker.ask_microcredits_per_unit, worker.load, worker.worker_id))
    _take(group.fastest, (duration_of_next_unit(worker), worker.ask_microcredits_per_unit, worker.worker_id))
    group.free_total -= free
    if worker.tier is not Tier.OPERATOR:
        account = state.accounts[worker.account_id]
        del account.own_free[worker.worker_id]
        if not account.own_free:
            state.own_ready.pop(account.account_id, None)


def _take(entries: list[tuple[int, int, PartyId]], entry: tuple[int, int, PartyId]) -> None:
    index = bisect_left(entries, entry)
    assert entries[index] == entry, "what is indexed stands in its index"
    del entries[index]
