"""What must hold after every step (DESIGN §9), and that every index says the same as what it indexes."""

from __future__ import annotations

from collections import Counter

from fallow.credits import PoolMode
from fallow.ids import JobId
from fallow.job import JOB_STATES_FINAL, JobState, Objective
from fallow.limits import JOB_TASKS_MAX, LEASES_PER_WORKER_MAX, TASK_ATTEMPTS_MAX
from fallow.ranges import RangeSet
from fallow.roles import Tier
from fallow.session import TaskKind
from fallow_coordinator.core.availability import HOURS_OF_WEEK
from fallow_coordinator.core.devices import identity_of, measurable
from fallow_coordinator.core.groups import ability_of_worker, duration_of_next_unit, fits
from fallow_coordinator.core.holding import CLEARANCES_MAX
from fallow_coordinator.core.lanes import CUTTABLE, wants_cutting
from fallow_coordinator.core.ledger import BookKind
from fallow_coordinator.core.ledger import held as held_by
from fallow_coordinator.core.limits import (
    BUNDLES_PER_WORKER_MAX,
    COST_PERMILLE_MAX,
    COST_PERMILLE_MIN,
    DEVIATIONS_KEPT,
    DUPLICATES_LIVE_MAX,
    DUPLICATES_PER_TASK_MAX,
    IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX,
    JOBS_UNFINISHED_PER_ACCOUNT_MAX,
    LEARNED_SETTLEMENTS,
    LEASES_REMEMBERED_MAX,
    PROFILE_ACCOUNTS_MAX,
    STRIKES_MAX,
    TASK_LOSSES_MAX,
    TOLERANCES_KEPT_MAX,
)
from fallow_coordinator.core.needs import Ability
from fallow_coordinator.core.postings import purse_of
from fallow_coordinator.core.sound import must as _must
from fallow_coordinator.core.state import NO_GROUP, Job, LaneKey, State, TaskPhase, Worker
from fallow_coordinator.core.verification_invariants import check_verifications


def check(state: State) -> None:
    """Raises InvariantError with the first contradiction found. Costs as much as the state is large."""
    _check_identity(state)
    _check_door(state)
    _check_tolerances(state)
    _check_sessions(state)
    _check_leases(state)
    for job in state.jobs.values():
        _check_job(state, job)
    _check_tasks(state)
    _check_devices(state)
    _check_groups(state)
    _check_health(state)
    _check_stays(state)
    _check_lanes(state)
    _check_own(state)
    _check_carbon(state)
    check_verifications(state)
    _check_costs(state)
    _check_counts(state)
    check_ledger(state)


def _check_identity(state: State) -> None:
    _must(len(state.parties) == len(state.parties_by_key), "a key belongs to one party")
    for key, party_id in state.parties_by_key.items():
        _must(state.parties[party_id].key_fingerprint == key, "parties are found by their own keys")
    uses = Counter(party.token_id for party in state.parties.values() if party.token_id is not None)
    for token_id, token in state.tokens.items():
        _must(token.uses == uses[token_id] <= token.uses_max, "a token lets in as many as it says")


def _check_door(state: State) -> None:
    for pool in state.pools.values():
        _must(pool.admitted.keys() <= state.accounts.keys(), "who is admitted is known")
        _must(pool.closed or not pool.admitted, "an open pool lists nobody")
    for bundle in state.bundles.values():
        _must(not bundle.held_reason or not bundle.jobs, "no unfinished job uses a held bundle")
        _must(bundle.clearances <= CLEARANCES_MAX, "claims bring about so many inspections and no more")


def _check_tolerances(state: State) -> None:
    _must(len(state.tolerances) <= TOLERANCES_KEPT_MAX, "tolerances are learned of so many pairs of classes")
    for accounts in state.tolerances.values():
        _must(len(accounts) <= PROFILE_ACCOUNTS_MAX, "so many accounts teach a tolerance")
        _must(all(len(one) <= DEVIATIONS_KEPT for one in accounts.values()), "each by so many rows")
        _must(accounts.keys() <= state.accounts.keys(), "who teaches is known")


def _check_sessions(state: State) -> None:
    open_sessions = {worker.session_id: worker_id for worker_id, worker in state.workers.items() if worker.session_id}
    _must(open_sessions == state.sessions, "each open session is its worker's one session")
    graces = [
        (worker.grace_until_ms, worker_id) for worker_id, worker in state.workers.items() if worker.grace_until_ms
    ]
    _must(sorted(graces) == state.graces, "every worker in grace stands in the index")
    for worker_id, worker in state.workers.items():
        away_with_leases = worker.session_id is None and bool(worker.leases)
        _must(away_with_leases == bool(worker.grace_until_ms), "who is away with leases is in grace, and nobody else")
        barred = worker.quarantined or state.parties[worker_id].revoked
        _must(not barred or (not worker.leases and worker.session_id is None), "who is barred holds nothing")
        _must(len(worker.leases) <= LEASES_PER_WORKER_MAX, "a worker holds no more than its limit")
        held = sum(state.tasks[state.leases[lease_id].task_id].unit_micros for lease_id in worker.leases)
        _must(held == worker.unit_micros_held, "units held are those of its leases")


def _check_leases(state: State) -> None:
    holders = [lease_id for worker in state.workers.values() for lease_id in worker.leases]
    _must(sorted(holders) == sorted(state.leases), "each live lease is held by one worker")
    deadlines = sorted((lease.deadline_ms, lease_id) for lease_id, lease in state.leases.items())
    _must(deadlines == state.deadlines, "each live lease has a deadline in the index")
    for lease_id, lease in state.leases.items():
        task = state.tasks[lease.task_id]
        _must(lease_id in state.workers[lease.worker_id].leases, "a lease is held by its own worker")
        _must(lease_id in task.lease_ids and 0 < lease.fence <= task.fence, "a live lease carries a fence of its task")
        _must(task.phase in (TaskPhase.LEASED, TaskPhase.ANSWERED), "a task with a lease is leased")
        _must(lease_id not in state.ended_leases, "a lease is live or over")
        session_id = state.workers[lease.worker_id].session_id
        _must(session_id is None or session_id == lease.session_id, "a lease is known to its worker's open session")
    _must(list(state.ended_leases) == list(state.ended_order), "ended leases are remembered in order")
    settled = Counter(
        ended.task_id for ended in state.ended_leases.values() if ended.outcome is None and not ended.late
    )
    _must(all(count == 1 for count in settled.values()), "a task is settled at most once")
    fences = Counter((ended.task_id, ended.fence) for ended in state.ended_leases.values())
    fences.update((lease.task_id, lease.fence) for lease in state.leases.values())
    _must(all(count == 1 for count in fences.values()), "no fence of a task is used twice")


def _check_job(state: State, job: Job) -> None:
    final = job.state in JOB_STATES_FINAL
    _must(final == (job.job_id in state.finished), "finished jobs, and no other, wait for the archive")
    _must(final != (job.job_id in state.bundles[job.bundle_digest].jobs), "a bundle knows its unfinished jobs")
    _must(not (final and job.tasks), "a finished job has no live tasks")
    _must(job.tasks_created <= JOB_TASKS_MAX, "a job has no more tasks than allowed")
    working = [state.tasks[task_id] for task_id in job.tasks if not state.tasks[task_id].checks]
    spans = [span for task in working for span in task.spans]
    delivered = [(span.job_position, span.job_position + span.rows) for result in job.results for span in result.spans]
    verification = state.verifications.get(job.job_id)
    withdrawn = [(start, end) for start, (end, _) in verification.redo.items()] if verification is not None else []
    deleted = bool(job.deleted_at_ms)
    _must(not deleted or (final and not job.results and not job.blocks and job.kept is None), "what is deleted is gone")
    corrected = any(result.corrects for result in job.results) or any(task.corrects for task in working) or withdrawn
    if not deleted and not corrected:
        _must(sum(end - start for start, end in delivered) == len(job.done), "each delivered row is delivered once")
        _must(RangeSet(delivered) == job.done, "what is done was delivered")
    if not deleted:
        _must(not (job.done - RangeSet(delivered)), "what is done was delivered")
    if not final:
        cut = RangeSet([*spans, *withdrawn, *job.done.ranges])
        _must(cut == RangeSet.of(0, job.next_row), "live tasks and results hold the cut rows")
        count = sum(end - start for start, end in [*spans, *withdrawn])
        _must(count + len(job.done) == job.next_row, "each row is in one place")
    _must(job.state is not JobState.SUCCEEDED or len(job.done) == job.rows, "success means every row")
    _must([result.cursor for result in job.results] == list(range(1, len(job.results) + 1)), "results are counted")
    _must(not job.late or not final or job.state is JobState.SUCCEEDED, "nobody works for a job that came to nothing")
    _must(not (deleted and job.late), "nobody works for a deleted job")
    leased = sum(state.tasks[task_id].rows for task_id in job.tasks if state.tasks[task_id].lease_id is not None)
    _must(leased == job.rows_leased, "rows leased are counted")
    checked = verification is not None
    failed = final or checked or job.rows_failed <= job.options.failed_rows_max
    _must(failed, "too many failed rows end a job")
    left = bool(job.tasks) or job.next_row < job.rows or checked
    _must(final or left, "an unfinished job has something left to do")
    shares: Counter[tuple[str, int]] = Counter()
    for result in job.results:
        for span in result.spans:
            for node, rows in result.rows_by_node(span) if result.worker_id else ():
                shares[result.worker_id, node] += rows
    _must(dict(shares) == job.shares, "delivered rows are counted by worker and node")
    listed = sum(len(result.failures) for result in job.results)
    _must(bool(corrected) or listed <= job.rows_failed, "failures listed are failures counted")


def _check_tasks(state: State) -> None:
    of_jobs = [task_id for job in state.jobs.values() for task_id in (*job.tasks, *job.late)]
    of_bundles = [b.inspection_task_id for b in state.bundles.values() if b.inspection_task_id is not None]
    of_challenges = [ch.check_task_id for ch in state.challenges.values() if ch.check_task_id is not None]
    of_challenges += [task_id for task_id, challenge in state.challenges.items() if challenge.output is None]
    owned = [*of_jobs, *of_bundles, *of_challenges]
    _must(sorted(owned) == sorted(state.tasks), "each live task belongs to one job, bundle or challenge")
    for task in state.tasks.values():
        out = task.phase in (TaskPhase.LEASED, TaskPhase.ANSWERED)
        _must((task.lease_id is not None) == out, "leased tasks, and no other, have leases")
        _must(all(lease_id in state.leases for lease_id in task.lease_ids), "a task's leases are live")
        _must(task.attempts < TASK_ATTEMPTS_MAX and task.losses < TASK_LOSSES_MAX, "nothing is tried for ever")
        if task.kind is TaskKind.MAP and task.phase in (TaskPhase.READY, TaskPhase.LEASED, TaskPhase.ANSWERED):
            _must(task.input is not None, "what can be leased is packed")
        if task.kind is TaskKind.INSPECT:
            _must((task.input is not None) == (task.rows > 0), "an inspection's rows stay until it ends")
    _check_duplicates(state)


def _check_duplicates(state: State) -> None:
    for task in state.tasks.values():
        holders = [state.leases[lease_id].worker_id for lease_id in task.lease_ids]
        _must(len(set(holders)) == len(holders), "a duplicate is in another worker's hands")
        _must(len(holders) < 2 or task.phase is TaskPhase.LEASED, "what is answered has one lease left")
        _must((task.answer is not None) == (task.phase is TaskPhase.ANSWERED), "what is answered knows its answer")
        late = task.job_id is not None and task.task_id in state.jobs[task.job_id].late
        _must((task.answer is not None) == late, "a job knows its late tasks")
        _must((task.task_id in state.duplicated) == (len(holders) == 2 or late), "tasks in two hands are known")
        _must(task.duplicates <= DUPLICATES_PER_TASK_MAX, "a task is doubled so often and no more")
        if task.answer is not None:
            committed = [state.leases[lease_id].commitment for lease_id in task.lease_ids]
            _must(committed == [None], "who commits late is settled at once")
    _must(state.duplicated.keys() <= state.tasks.keys(), "tasks in two hands are live")
    _must(len(state.duplicated) <= DUPLICATES_LIVE_MAX, "so many tasks are in two hands and no more")


def _check_devices(state: State) -> None:
    asked = Counter((challenge.worker_id, challenge.plan.device_id) for challenge in state.challenges.values())
    _must(all(count == 1 for count in asked.values()), "a device has one challenge at a time")
    for task_id, challenge in state.challenges.items():
        task = state.tasks.get(task_id)
        if task is not None:
            _must(task.kind is TaskKind.CHALLENGE and task.lease_id is not None, "a challenge lives with its lease")
            holder = state.leases[task.lease_id].worker_id if task.lease_id is not None else None
            _must(holder == challenge.worker_id, "a challenge is in the hands of its own worker")
        _must(challenge.output is None or challenge.answered, "what is delivered was answered in time")
        if challenge.check_task_id is not None:
            check_task = state.tasks[challenge.check_task_id]
            _must(check_task.kind is TaskKind.CHECK and check_task.challenge_task_id == task_id, "a check knows which")
            _must(check_task.lease_id is not None and challenge.output is not None, "only answers are checked")
    for worker_id, worker in state.workers.items():
        devices = {device.device_id: identity_of(device) for device in measurable(worker)}
        for device_id, held in worker.certificates.items():
            _must(held.device_id == device_id, "a certificate is found by its device")
            _must(devices.get(device_id) == held.device_digest, "a certificate is of the device as it is now")
            _must(bool(held.units_milli_per_s) == (held.speed_challenge is not None), "speed was shown by a challenge")
            _must(bool(held.memory_bytes) == (held.memory_challenge is not None), "memory was shown by a challenge")
        at_leisure = worker.session_id is not None and not worker.leases
        _must(at_leisure or not worker.free_since_ms, f"who holds leases or is away is not free: {worker_id}")


def _check_groups(state: State) -> None:
    members: dict[Ability, list[Worker]] = {group.ability: [] for group in state.groups.values()}
    for worker in state.workers.values():
        placed = worker.session_id is not None and not worker.quarantined
        _must(placed == (worker.group != NO_GROUP), "who is connected counts in a group, and nobody else")
        _must(worker.free >= 0, "windows are kept")
        if placed:
            ability = ability_of_worker(state, worker)
            _must(state.group_numbers.get(ability) == worker.group, "a worker counts where it belongs")
            members[ability].append(worker)
        for digest in worker.bundles:
            _must(digest in state.bundles, "bundles that workers have are known")
    for bundle in state.bundles.values():
        for worker_id in bundle.holders:
            _must(bundle.bundle_digest in state.workers[worker_id].bundles, "who has a bundle knows it")
    stocked = [task for task in state.tasks.values() if task.stock_group != NO_GROUP]
    free = hungry = wanting = 0
    for number, group in state.groups.items():
        here = members[group.ability]
        _must(state.group_numbers[group.ability] == number == group.number, "groups are found by what they offer")
        _must({worker.worker_id for worker in here} == set(group.members), "a group knows its members")
        open_ones = [worker for worker in here if worker.free]
        cheapest = [(w.ask_microcredits_per_unit, w.load, w.worker_id) for w in open_ones]
        fastest = [(duration_of_next_unit(w), w.ask_microcredits_per_unit, w.worker_id) for w in open_ones]
        _must(group.cheapest == sorted(cheapest), "free workers stand in their group")
        _must(group.fastest == sorted(fastest), "free workers stand in their group by speed")
        _must(group.asks == sorted(w.ask_microcredits_per_unit for w in here if w.room), "asks stand in their group")
        _must(group.free_total == sum(worker.free for worker in here), "free windows are counted")
        _must(group.window_total == sum(worker.room for worker in here), "windows are counted")
        _must(group.ahead_total == sum(min(w.slots, w.room) for w in here), "slots are counted")
        stock = [task for task in stocked if task.stock_group == number]
        _must(group.stock == len(stock), "stock is counted")
        _must(group.packing == sum(task.phase is TaskPhase.PACKING for task in stock), "packing is counted")
        _must(bool(here or stock), "a group of nothing goes")
        free |= bool(group.free_total) << number
        hungry |= (group.packing < group.free_total) << number
        wanting |= (group.stock < group.free_total + group.ahead_total) << number
    sets = (state.free_groups, state.hungry_groups, state.wanting_groups)
    _must(sets == (free, hungry, wanting), "sets of groups say what the groups say")
    _must(len(state.groups) == len(state.group_numbers), "each group is found")


def _check_health(state: State) -> None:
    resting = sorted((w.cooling_until_ms, worker_id) for worker_id, w in state.workers.items() if w.cooling_until_ms)
    _must(resting == state.cooling, "who rests stands in the index")
    for worker in state.workers.values():
        _must(0 <= worker.strikes <= STRIKES_MAX, "strikes have a limit")
        _must(not worker.cooling_until_ms or worker.window_max == 1, "who rests begins anew with one lease")
        _must(len(worker.speeds) <= BUNDLES_PER_WORKER_MAX, "speeds remembered have a limit")


def _check_stays(state: State) -> None:
    for worker in state.workers.values():
        stays = worker.stays
        _must(all(0 <= hour < HOURS_OF_WEEK for hour in stays.minutes), "a week has its hours")
        _must(min(stays.minutes.values(), default=0) >= 0, "time is not negative")
        risks = zip(stays.ends, stays.at_risk, strict=True)
        _must(all(0 <= ended <= risked for ended, risked in risks), "who left was there")


def _check_lanes(state: State) -> None:
    jobs: Counter[LaneKey] = Counter(job.lane for job in state.jobs.values() if job.state not in JOB_STATES_FINAL)
    jobs.update(task.lane for task in state.tasks.values() if task.job_id is None or task.kind is TaskKind.REFEREE)
    _must(dict(jobs) == {key: lane.jobs for key, lane in state.lanes.items()}, "a lane counts its work")
    _must({key for key, lane in state.lanes.items() if lane.ready} == set(state.open_lanes), "open lanes are known")
    for key, lane in state.lanes.items():
        fitting = [group for group in state.groups.values() if fits(key, lane, group)]
        _must(lane.groups == sum(1 << group.number for group in fitting), "a lane knows who fits")
        _must(lane.window_total == sum(group.window_total for group in fitting), "a lane knows how many fit")
        tasks = [task for task in state.tasks.values() if task.lane == key]
        standing = [t for t in tasks if t.job_id is None or not state.jobs[t.job_id].parked]
        waiting = [(t.not_before_ms, t.number, t.task_id) for t in standing if t.phase is TaskPhase.WAITING]
        _must(sorted(waiting) == lane.waiting, "waiting tasks stand in their lane")
        packing = {task.task_id for task in tasks if task.phase is TaskPhase.PACKING}
        _must(packing == set(lane.packing), "tasks in packing stand in their lane")
        ready = [(t.stamp, t.number, t.task_id) for t in standing if t.phase is TaskPhase.READY]
        _must(sorted(ready) == lane.ready, "ready tasks stand in their lane")
        cuttable: dict[str, list[tuple[int, int, str]]] = {}
        for job in state.jobs.values():
            if job.lane == key and wants_cutting(job):
                cuttable.setdefault(job.account_id, []).append((job.due_ms, job.number, job.job_id))
        queues = {account_id: sorted(entries) for account_id, entries in cuttable.items()}
        _must(queues == lane.accounts, "jobs with rows to cut stand in their lane")
        turns = sorted((state.accounts[account_id].share_key, account_id) for account_id in lane.accounts)
        _must(turns == lane.queue, "accounts stand in the order of their turns")


def _check_own(state: State) -> None:
    standing: dict[str, list[tuple[int, int, str]]] = {}
    stock: Counter[str] = Counter()
    for task in state.tasks.values():
        job = state.jobs[task.job_id] if task.job_id is not None else None
        if job is None or task.phase not in (TaskPhase.PACKING, TaskPhase.READY):
            continue
        if task.phase is TaskPhase.PACKING or not job.parked:
            stock[job.account_id] += 1
        if task.phase is TaskPhase.READY and not job.parked:
            standing.setdefault(job.account_id, []).append((task.stamp, task.number, task.task_id))
    for account_id, account in state.accounts.items():
        mine = [w for w in state.workers.values() if w.account_id == account_id and w.tier is not Tier.OPERATOR]
        placed = [worker for worker in mine if worker.group != NO_GROUP]
        _must({worker.worker_id for worker in placed} == set(account.own_workers), "own workers are known")
        _must(
            {worker.worker_id for worker in placed if worker.free} == set(account.own_free), "own free ones are known"
        )
        _must(account.own_ahead == sum(min(w.slots, w.room) for w in placed), "own slots are counted")
        _must(account.ready == sorted(standing.get(account_id, [])), "an account knows its ready tasks")
        _must(account.stock == stock[account_id], "an account's stock is counted")
        lanes = {key for key, lane in state.lanes.items() if account_id in lane.accounts}
        _must(set(account.lanes) == lanes, "an account knows where its rows wait")
        _must((account_id in state.own_ready) == bool(account.ready and account.own_free), "own pairs are known")
        wanting = bool(account.lanes) and account.stock < account.own_ahead
        _must((account_id in state.own_wanting) == wanting, "own wants are known")


def _check_carbon(state: State) -> None:
    for job in state.jobs.values():
        _must(not job.deferred_until_ms or (job.parked and job.state in CUTTABLE), "who waits could run and is parked")
        _must(not job.parked or bool(job.deferred_until_ms) or job.state is JobState.PAUSED, "who is parked waits")
        unfinished = job.state not in JOB_STATES_FINAL
        wanted = unfinished and job.options.objective is Objective.CARBON
        _must((job.job_id in state.carbon_jobs) == wanted, "jobs that want little carbon are known")
        total = job.late_footprint
        for result in job.results:
            total = total.plus(result.footprint)
        _must(bool(job.deleted_at_ms) or total == job.footprint, "a job's energy is that of its results")
    deferred = sorted((job.deferred_until_ms, job.job_id) for job in state.jobs.values() if job.deferred_until_ms)
    _must(deferred == state.deferred, "jobs that wait stand in the index")
    footprints = [job.footprint for job in state.jobs.values()]
    footprints += [worker.footprint for worker in state.workers.values()]
    for footprint in footprints:
        parts = (footprint.millijoules_measured, footprint.micrograms, footprint.millijoules_unplaced)
        _must(min(parts) >= 0 and max(parts[0], parts[2]) <= footprint.millijoules, "energy is a quantity")


def _check_costs(state: State) -> None:
    for bundle in state.bundles.values():
        _must(COST_PERMILLE_MIN <= bundle.cost_permille <= COST_PERMILLE_MAX, "what is learned of cost is bounded")
        _must(bundle.learning_tasks < LEARNED_SETTLEMENTS, "learning begins anew after so many tasks")
        _must(bool(bundle.learning_tasks) == bool(bundle.learning_worked), "what is learned comes from tasks")
    for job in state.jobs.values():
        _must(COST_PERMILLE_MIN <= job.cost_permille <= COST_PERMILLE_MAX, "a job's cost is one that was learned")


def _check_counts(state: State) -> None:
    unfinished = Counter(job.account_id for job in state.jobs.values() if job.state not in JOB_STATES_FINAL)
    blocks: Counter[str] = Counter()
    for job in state.jobs.values():
        blocks[job.account_id] += len(job.blocks) if job.state not in JOB_STATES_FINAL else 0
    keys = Counter(account_id for account_id, _ in state.idempotency)
    outputs: Counter[tuple[str, bytes]] = Counter()
    for job in state.jobs.values():
        outputs.update((job.account_id, result.output.digest) for result in job.results if result.output is not None)
    for account_id, account in state.accounts.items():
        _must(account.blobs.keys() == account.blobs_recorded_at_ms.keys(), "each recorded blob has its moment")
        recorded = sum(stored.blob.length_bytes for stored in account.blobs.values())
        _must(account.blob_bytes == recorded, "recorded bytes are counted")
        _must(account.jobs_unfinished == unfinished[account_id] <= JOBS_UNFINISHED_PER_ACCOUNT_MAX, "jobs are counted")
        _must(account.blocks_unfinished == blocks[account_id], "blocks of unfinished jobs are counted")
        _must(account.idempotency_keys == keys[account_id] <= IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX, "keys are counted")
        for output, (_, count) in account.outputs.items():
            _must(outputs[account_id, output] == count, "outputs are counted")
    known = sum(count for account in state.accounts.values() for _, count in account.outputs.values())
    _must(outputs.total() == known, "outputs are known")
    _must(len(state.ended_leases) <= LEASES_REMEMBERED_MAX, "what is remembered has a limit")
    _must(list(state.idempotency) == list(state.idempotency_order), "keys are remembered in order")
    _must(list(state.finished.values()) == sorted(state.finished.values()), "finished jobs stand in order")


def check_ledger(state: State) -> None:
    """Raises InvariantError or LedgerError when the books don't add up, or don't hold what leases may cost."""
    ledger = state.ledger
    ledger.check()
    reserved: Counter[JobId] = Counter()
    for lease in state.leases.values():
        job_id = state.tasks[lease.task_id].job_id
        _must(job_id is not None or not lease.reserved_microcredits, "only jobs pay")
        if job_id is not None:
            reserved[job_id] += lease.reserved_microcredits
    for job_id, job in state.jobs.items():
        _must(job.reserved_microcredits == reserved[job_id], "reservations are those of live leases")
        promised = ledger.balance(held_by(job_id, purse_of(job)))
        _must(promised >= reserved[job_id], "what leases may cost is held")
        exactly = job.mode is not PoolMode.QUOTA or promised == reserved[job_id]
        _must(exactly, "a quota job holds what its leases may cost")
        if job.mode is PoolMode.MARKET and job.state not in JOB_STATES_FINAL:
            _must(promised + job.microcredits == job.budget_microcredits, "a budget is held or paid")
        if job.mode is PoolMode.MARKET and job.state in JOB_STATES_FINAL:
            _must(promised == job.reserved_microcredits, "a job that ended holds what late leases may cost")
        bounded = job.mode is PoolMode.MARKET or bool(job.budget_microcredits)
        _must(not bounded or job.microcredits <= job.budget_microcredits, "a budget is never overrun")
        _must(job.mode is not PoolMode.DONATION or not (promised or job.microcredits), "a donation costs nothing")
    for book in ledger.balances:
        if book.kind is BookKind.HELD:
            holder = state.jobs.get(JobId(book.owner))
            works = holder is not None and (holder.state not in JOB_STATES_FINAL or bool(holder.late))
            _must(works, "only jobs for which somebody works hold anything")
    renewals = sorted((one.renews_at_ms, *key) for key, one in ledger.allotments.items())
    _must(renewals == ledger.renewals, "every allotment stands in the index")
    _must(list(ledger.transfers) == list(ledger.transfers_order), "transfers are remembered in order")
