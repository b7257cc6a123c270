"""What can start now: one step at a time, found by looking at the state. Ties go by number and by identifier.

Feasible → score → pick (`docs/decisions/0010`). Lanes hold tasks that ask the same of workers, groups hold workers that
offer the same; which fits which is a bit in the lane, so that a step costs about as much with ten workers and ten
tasks as with ten thousand of each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from fallow.ids import AccountId, JobId, LeaseId, PartyId, TaskId
from fallow.job import JobState, Objective
from fallow.roles import Tier
from fallow.session import TaskKind
from fallow_coordinator.core import auditing, verifying
from fallow_coordinator.core import events as e
from fallow_coordinator.core.availability import stays_permille
from fallow_coordinator.core.carbon import grams_at
from fallow_coordinator.core.cutting import Layout, cost_of, cut_size, unit_micros
from fallow_coordinator.core.evolve_tasks import submitter_of
from fallow_coordinator.core.funding import Shortage, Terms, lease_terms, paused
from fallow_coordinator.core.groups import numbers_in
from fallow_coordinator.core.limits import (
    INSPECTION_RUNTIME_MS,
    LONG_TASK_UNITS,
    OWN_WORKERS_LOOKED_AT_MAX,
    READY_LOOK_AHEAD,
    RUNTIME_FACTOR,
    RUNTIME_MS_MAX,
    RUNTIME_MS_MIN,
    STAYERS_LOOKED_AT_MAX,
    TASK_UNIT_MICROS_MAX,
    TRANSFER_BYTES_PER_MS_MIN,
    UNIT_MICROS,
)
from fallow_coordinator.core.names import Names
from fallow_coordinator.core.needs import INSPECTION, Needs, fits_own, misfit
from fallow_coordinator.core.shares import share_key_after
from fallow_coordinator.core.speeds import expected_ms
from fallow_coordinator.core.state import NO_GROUP, Account, Job, Lane, State, Task, Worker, WorkerGroup

_TIER_RANK = {Tier.VOLUNTEER: 0, Tier.MANAGED: 1, Tier.OPERATOR: 2}
_ALL_SLOTS = 1_000
"""Load of a worker with a lease for each slot."""


def next_step(state: State, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """Events that start one more piece of work: a lease, or a packing, or a fresh task; none when nothing can start."""
    if state.free_groups:
        pair = _own_pair(state) or _inspection_pair(state, now_ms) or _shared_pair(state)
        if pair is not None:
            return _grant(state, pair.task, pair.worker, now_ms, names, runner_up_ask=pair.runner_up_ask)
    return _prepare(state, now_ms, names)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A task and who gets it."""

    task: Task
    worker: Worker
    runner_up_ask: int | None = None
    """Cheapest ask of another free worker that fits; None: there is none, or nothing is paid."""


# ------------------------------------------------------------------------------------------------- who gets a lease


def _own_pair(state: State) -> _Pair | None:
    """Work of an account for a free worker of its own."""
    for account_id in state.own_ready:
        account = state.accounts[account_id]
        for _, _, task_id in account.ready[:READY_LOOK_AHEAD]:
            task = state.tasks[task_id]
            for worker_id in islice(account.own_free, OWN_WORKERS_LOOKED_AT_MAX):
                worker = state.workers[worker_id]
                if not _may_take_own(state, task.lane, worker) or worker_id in task.avoid:
                    continue
                if auditing.may_take(state, task, worker):
                    return _Pair(task, worker)
    return None


def _may_take_own(state: State, key: Needs, worker: Worker) -> bool:
    """Whether such work of its own account may go to a worker now."""
    ability = state.groups[worker.group].ability
    return ability.region not in state.lanes[key].regions_closed and fits_own(key, ability)


def _inspection_pair(state: State, now_ms: int) -> _Pair | None:
    """The inspection whose turn it is: that of the account that was served longest ago.

    Whoever registers many slow programs waits behind everybody else, each time anew.
    """
    lane = state.lanes.get(INSPECTION)
    if lane is None or not lane.groups & state.free_groups:
        return None
    due = [(number, task_id) for not_before_ms, number, task_id in lane.waiting if not_before_ms <= now_ms]

    def turn(entry: tuple[int, TaskId]) -> tuple[int, int]:
        number, task_id = entry
        return state.accounts[submitter_of(state, state.tasks[task_id])].inspected_last, number

    for _, task_id in sorted(due, key=turn):
        pair = _pair_of(state, INSPECTION, lane, state.tasks[task_id])
        if pair is not None:
            return pair
    return None


def _shared_pair(state: State) -> _Pair | None:
    """The ready task whose turn it is among those that a free worker may take, by fair share over all lanes."""
    heads = [
        (lane.ready[0], key, lane)
        for key, lane in ((key, state.lanes[key]) for key in state.open_lanes)
        if lane.groups & state.free_groups
    ]
    while heads:
        first = min(range(len(heads)), key=lambda index: heads[index][0])
        _, key, lane = heads.pop(first)
        for _, _, task_id in lane.ready[:READY_LOOK_AHEAD]:
            pair = _pair_of(state, key, lane, state.tasks[task_id])
            if pair is not None:
                return pair
    return None


def _pair_of(state: State, key: Needs, lane: Lane, task: Task) -> _Pair | None:
    """Who gets the task: the cheapest, then least loaded, then least trusted free worker that fits.

    Operators' machines are scarce, so they come last among equals. With the objective speed, who would be done first.
    A worker on which the task failed gets it again only when no other takes work.
    """
    limit = state.jobs[task.job_id].options.limit_microcredits_per_unit if key.paid and task.job_id else 0
    fitting = _cleanest_groups(state, lane) if key.objective is Objective.CARBON else lane.groups & state.free_groups
    best = _best_in(state, key, task, fitting, limit)
    if best is None and key.objective is Objective.CARBON:
        # What failed in the clean regions may go anywhere: clean rows are worth less than rows.
        fitting = (_groups_wherever(state, key) if task.avoid else lane.groups) & state.free_groups
        best = _best_in(state, key, task, fitting, limit)
    if best is not None:
        chosen_id: PartyId | None = None
        if task.checks or auditing.has_strangers(state, task):
            # Of nobody else is it known that he may have these rows.
            chosen_id = best[3]
        elif task.unit_micros > LONG_TASK_UNITS * UNIT_MICROS:
            chosen_id = _stayer(state, fitting, task, best[3])
        elif key.objective is not Objective.SPEED:
            chosen_id = _holder(state, fitting, task, best)
        worker = state.workers[chosen_id or best[3]]
        return _Pair(task, worker, _runner_up_ask(state, lane, worker) if key.paid else None)
    if not task.avoid or _somebody_else_takes_work(state, key, lane, task):
        return None
    for group in _free_groups(state, lane):
        for _, _, worker_id in group.cheapest:
            worker = state.workers[worker_id]
            if not auditing.may_take(state, task, worker):
                continue
            if worker.ask_microcredits_per_unit <= limit:
                return _Pair(task, worker, _runner_up_ask(state, lane, worker) if key.paid else None)
            break
    return None


def _best_in(state: State, key: Needs, task: Task, fitting: int, limit: int) -> tuple[int, int, int, PartyId] | None:
    """The best free worker of these groups on which the task has not failed: what counts, tier rank, identifier."""
    best: tuple[int, int, int, PartyId] | None = None
    for number in numbers_in(fitting):
        group = state.groups[number]
        entries = group.fastest if key.objective is Objective.SPEED else group.cheapest
        for first, second, worker_id in entries:
            worker = state.workers[worker_id]
            if worker.ask_microcredits_per_unit > limit:
                if entries is group.cheapest:
                    break
            elif worker_id not in task.avoid and auditing.may_take(state, task, worker):
                rank = (first, second, _TIER_RANK[group.ability.tier], worker_id)
                best = rank if best is None or rank < best else best
                break
    return best


def _free_groups(state: State, lane: Lane) -> Iterator[WorkerGroup]:
    return (state.groups[number] for number in numbers_in(lane.groups & state.free_groups))


def _cleanest_groups(state: State, lane: Lane) -> int:
    """Of the groups with free window that fit, those whose electricity is the cleanest in this hour."""
    found, lowest = 0, None
    for number in numbers_in(lane.groups & state.free_groups):
        grams = grams_at(state.forecasts, state.groups[number].ability.region, state.clock_ms) or 0
        if lowest is None or grams < lowest:
            found, lowest = 0, grams
        if grams == lowest:
            found |= 1 << number
    return found


def _groups_wherever(state: State, key: Needs) -> int:
    """The groups that fit, those of closed regions too."""
    return sum(1 << group.number for group in state.groups.values() if misfit(key, group.ability) is None)


def _somebody_else_takes_work(state: State, key: Needs, lane: Lane, task: Task) -> bool:
    """Whether a worker that fits, busy or not, has not failed at the task."""
    if task.checks and key.kind is TaskKind.MAP:
        return auditing.others_may_audit(state, lane, task)
    fitting, rooms = lane.groups, lane.window_total
    if lane.regions_closed:
        fitting = _groups_wherever(state, key)
        rooms = sum(state.groups[number].window_total for number in numbers_in(fitting))
    avoided = 0
    for worker_id in task.avoid:
        worker = state.workers[worker_id]
        if worker.group != NO_GROUP and fitting >> worker.group & 1:
            avoided += worker.room
    return rooms > avoided


def _holder(state: State, fitting: int, task: Task, best: tuple[int, int, int, PartyId]) -> PartyId | None:
    """Among workers as good as the best one: who has the bundle loaded, or at least on its disk."""
    ask, load, tier_rank, _ = best
    found: tuple[bool, int, PartyId] | None = None
    for worker_id in state.bundles[task.bundle_digest].holders:
        worker = state.workers[worker_id]
        if not worker.free or not fitting >> worker.group & 1 or worker_id in task.avoid:
            continue
        as_good = worker.load <= load or worker.load < _ALL_SLOTS
        if worker.ask_microcredits_per_unit == ask and as_good and _TIER_RANK[worker.tier] <= tier_rank:
            rank = (not worker.bundles[task.bundle_digest], worker.load, worker_id)
            found = rank if found is None or rank < found else found
    return found[2] if found is not None else None


def _stayer(state: State, fitting: int, task: Task, best_id: PartyId) -> PartyId:
    """Who, among workers as cheap as the best one and trusted no more, most likely stays for a long task."""
    best = state.workers[best_id]
    entries = [(best_id, best.load)]
    for number in numbers_in(fitting):
        group = state.groups[number]
        if _TIER_RANK[group.ability.tier] <= _TIER_RANK[best.tier]:
            first = bisect_left(group.cheapest, (best.ask_microcredits_per_unit, 0, ""))
            entries += [
                (worker_id, load)
                for ask, load, worker_id in group.cheapest[first : first + STAYERS_LOOKED_AT_MAX]
                if ask == best.ask_microcredits_per_unit and worker_id not in task.avoid
            ]

    def rank(entry: tuple[PartyId, int]) -> tuple[int, int, PartyId]:
        worker = state.workers[entry[0]]
        needed_ms = expected_ms(state, worker, task.bundle_digest, task.unit_micros)
        # By tenths: the next one who is as good as certain is no better for being a little more so.
        return -(stays_permille(worker, state.clock_ms, needed_ms) // 100), entry[1], entry[0]

    return min(entries, key=rank)[0]


def _runner_up_ask(state: State, lane: Lane, winner: Worker) -> int | None:
    """The cheapest ask of a free worker that fits and is not the winner."""
    asks = (
        next((ask for ask, _, worker_id in group.cheapest if worker_id != winner.worker_id), None)
        for group in _free_groups(state, lane)
    )
    return min((ask for ask in asks if ask is not None), default=None)


# ------------------------------------------------------------------------------------------------- what is made ready


def _prepare(state: State, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    """One more packing, when workers could take more than is packed: of a task that waits, or of rows cut now."""
    if state.verifications:
        made = verifying.next_step(state, now_ms, names)
        if made:
            return made
    for account_id in state.own_wanting:
        account = state.accounts[account_id]
        for key in account.lanes:
            if _serves_own(state, account, key):
                return _cut(state, state.jobs[state.lanes[key].accounts[account_id][0][2]], now_ms, names)
    best: tuple[tuple[int, AccountId], JobId] | None = None
    starving = state.wanting_groups | state.hungry_groups
    if not starving:
        return ()
    for key, lane in state.lanes.items():
        # Ready tasks beside free windows are such as nobody free may take: a few more may be made for those.
        wanting = starving if len(lane.ready) < READY_LOOK_AHEAD else state.wanting_groups
        if not lane.groups & wanting or key.kind is TaskKind.INSPECT:
            continue
        if lane.waiting and lane.waiting[0][0] <= now_ms:
            task = state.tasks[lane.waiting[0][2]]
            return (e.PackRequested(task_id=task.task_id, pack_number=task.pack_number + 1),)
        if lane.queue and (best is None or lane.queue[0] < best[0]):
            turn = _next_job(state, key, lane, wanting)
            if turn is not None and (best is None or turn[0] < best[0]):
                best = turn
    return _cut(state, state.jobs[best[1]], now_ms, names) if best is not None else ()


def _next_job(state: State, key: Needs, lane: Lane, wanting: int) -> tuple[tuple[int, AccountId], JobId] | None:
    """Whose turn it is in a lane, and the job; with prices, the first whose limit some worker's ask does not exceed."""
    if not key.paid:
        return lane.queue[0], lane.accounts[lane.queue[0][1]][0][2]
    groups = (state.groups[number] for number in numbers_in(lane.groups & wanting))
    cheapest = min((group.asks[0] for group in groups if group.asks), default=0)
    for turn in lane.queue[:READY_LOOK_AHEAD]:
        for _, _, job_id in lane.accounts[turn[1]][:READY_LOOK_AHEAD]:
            if state.jobs[job_id].options.limit_microcredits_per_unit >= cheapest:
                return turn, job_id
    return None


def _serves_own(state: State, account: Account, key: Needs) -> bool:
    """Whether one of the account's own workers fits the lane."""
    return any(
        _may_take_own(state, key, state.workers[worker_id])
        for worker_id in islice(account.own_workers, OWN_WORKERS_LOOKED_AT_MAX)
    )


def _grant(
    state: State, task: Task, worker: Worker, now_ms: int, names: Names, *, runner_up_ask: int | None
) -> tuple[e.Event, ...]:
    """The one place where a lease of a job, or an inspection, is made; a job that cannot pay for it pauses instead."""
    terms = lease_terms(state, task, worker, runner_up_ask)
    if isinstance(terms, Shortage):
        assert task.job_id is not None, "only jobs pay"
        return (paused(task.job_id, terms),)
    granted = lease_granted(task, worker, terms, now_ms, names)
    if task.job_id is not None and state.jobs[task.job_id].state is JobState.QUEUED:
        running = e.JobStateChanged(job_id=task.job_id, state=JobState.RUNNING, reason="", reason_code="")
        return (granted, running)
    return (granted,)


def lease_granted(task: Task, worker: Worker, terms: Terms, now_ms: int, names: Names) -> e.LeaseGranted:
    """The lease of a task to a worker that is connected and free, on these terms."""
    assert worker.session_id is not None, "free workers are connected"
    runtime_max_ms = runtime_limit_ms(task)
    return e.LeaseGranted(
        lease_id=LeaseId(names.new("lease")),
        task_id=task.task_id,
        worker_id=worker.worker_id,
        session_id=worker.session_id,
        fence=task.fence + 1,
        deadline_ms=now_ms + runtime_max_ms + _queue_ms(worker) + _transfer_ms(task),
        runtime_max_ms=runtime_max_ms,
        price_microcredits_per_unit=terms.price_microcredits_per_unit,
        reserved_microcredits=terms.reserved_microcredits,
    )


def runtime_limit_ms(task: Task) -> int:
    """How long a task may run: generous, because a reference core is not the worker's."""
    rows_ms = min(RUNTIME_MS_MAX, max(RUNTIME_MS_MIN, RUNTIME_FACTOR * task.unit_micros * 1_000 // UNIT_MICROS))
    if task.kind is TaskKind.INSPECT:
        return INSPECTION_RUNTIME_MS + (rows_ms if task.rows else 0)
    return rows_ms


def _queue_ms(worker: Worker) -> int:
    """How long the leases that it holds already may take before this one's turn comes."""
    rounds = len(worker.leases) // worker.slots
    held_ms = RUNTIME_FACTOR * worker.unit_micros_held * 1_000 // UNIT_MICROS // worker.slots
    return min(RUNTIME_MS_MAX, max(held_ms, rounds * RUNTIME_MS_MIN))


def _transfer_ms(task: Task) -> int:
    """Time for its input and an output of about that size on a slow link."""
    length_bytes = task.input.length_bytes if task.input is not None else 0
    return 2 * length_bytes // TRANSFER_BYTES_PER_MS_MIN


def _cut(state: State, job: Job, now_ms: int, names: Names) -> tuple[e.Event, ...]:
    leases = state.lanes[job.lane].window_total
    bundle = state.bundles[job.bundle_digest]
    report = bundle.report
    assert report is not None, "a job is queued when its bundle is inspected"
    layout = Layout(job.row_starts, job.byte_starts)
    rates = cost_of(job, report)
    rows = cut_size(
        layout,
        rates,
        start=job.next_row,
        batch_rows=max(1, report.canonical_batch_rows),
        leases=max(1, leases),
        output_row_bytes=bundle.output_row_bytes,
    )
    end = job.next_row + rows
    task_id = TaskId(names.new("task"))
    cost = min(TASK_UNIT_MICROS_MAX, unit_micros(layout, rates, job.next_row, end))
    created = e.TaskCreated(
        task_id=task_id,
        kind=TaskKind.MAP,
        job_id=job.job_id,
        bundle_digest=job.bundle_digest,
        pool_id=job.pool_id,
        spans=((job.next_row, end),),
        unit_micros=cost,
        share_key=share_key_after(state.accounts[job.account_id].share_key, cost, now_ms),
    )
    return (created, e.PackRequested(task_id=task_id, pack_number=1))
