"""What must hold after every step (DESIGN §9), and that every index says the same as what it indexes."""

from __future__ import annotations

from collections import Counter

from fallow.job import JOB_STATES_FINAL, JobState
from fallow.limits import JOB_TASKS_MAX, LEASES_PER_WORKER_MAX, TASK_ATTEMPTS_MAX
from fallow.ranges import RangeSet
from fallow.session import TaskKind
from fallow_coordinator.core.groups import groups_of_worker
from fallow_coordinator.core.limits import (
    IDEMPOTENCY_KEYS_PER_ACCOUNT_MAX,
    JOBS_UNFINISHED_PER_ACCOUNT_MAX,
    LEASES_REMEMBERED_MAX,
    TASK_LOSSES_MAX,
)
from fallow_coordinator.core.state import GroupKey, Job, LaneKey, State, TaskPhase


class InvariantError(AssertionError):
    """The state contradicts itself: the core is wrong."""


def check(state: State) -> None:
    """Raises InvariantError with the first contradiction found. Costs as much as the state is large."""
    _check_identity(state)
    _check_sessions(state)
    _check_leases(state)
    for job in state.jobs.values():
        _check_job(state, job)
    _check_tasks(state)
    _check_groups(state)
    _check_lanes(state)
    _check_counts(state)


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise InvariantError(what)


def _check_identity(state: State) -> None:
    _must(len(state.parties) == len(state.parties_by_key), "a key belongs to one party")
    for key, party_id in state.parties_by_key.items():
        _must(state.parties[party_id].key_fingerprint == key, "parties are found by their own keys")
    uses = Counter(party.token_id for party in state.parties.values() if party.token_id is not None)
    for token_id, token in state.tokens.items():
        _must(token.uses == uses[token_id] <= token.uses_max, "a token lets in as many as it says")


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
        _must(task.lease_id == lease_id and task.fence == lease.fence, "a live lease carries its task's newest fence")
        _must(task.phase is TaskPhase.LEASED, "a task with a lease is leased")
        _must(lease_id not in state.ended_leases, "a lease is live or over")
        session_id = state.workers[lease.worker_id].session_id
        _must(session_id is None or session_id == lease.session_id, "a lease is known to its worker's open session")
    _must(list(state.ended_leases) == list(state.ended_order), "ended leases are remembered in order")
    settled = Counter(ended.task_id for ended in state.ended_leases.values() if ended.outcome is None)
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
    spans = [span for task_id in job.tasks for span in state.tasks[task_id].spans]
    delivered = [(span.job_position, span.job_position + span.rows) for result in job.results for span in result.spans]
    deleted = bool(job.deleted_at_ms)
    _must(not deleted or (final and not job.results and not job.blocks and job.kept is None), "what is deleted is gone")
    if not deleted:
        _must(sum(end - start for start, end in delivered) == len(job.done), "each delivered row is delivered once")
        _must(RangeSet(delivered) == job.done, "what is done was delivered")
    if not final:
        cut = RangeSet([*spans, *delivered])
        _must(cut == RangeSet.of(0, job.next_row), "live tasks and results hold the cut rows")
        _must(sum(end - start for start, end in spans) + len(job.done) == job.next_row, "each row is in one place")
    _must(job.state is not JobState.SUCCEEDED or len(job.done) == job.rows, "success means every row")
    _must([result.cursor for result in job.results] == list(range(1, len(job.results) + 1)), "results are counted")
    leased = sum(state.tasks[task_id].rows for task_id in job.tasks if state.tasks[task_id].lease_id is not None)
    _must(leased == job.rows_leased, "rows leased are counted")
    _must(final or job.rows_failed <= job.options.failed_rows_max, "too many failed rows end a job")
    _must(final or bool(job.tasks) or job.next_row < job.rows, "an unfinished job has something left to do")
    listed = sum(len(result.failures) for result in job.results)
    _must(listed <= job.rows_failed, "failures listed are failures counted")


def _check_tasks(state: State) -> None:
    of_jobs = [task_id for job in state.jobs.values() for task_id in job.tasks]
    of_bundles = [b.inspection_task_id for b in state.bundles.values() if b.inspection_task_id is not None]
    _must(sorted([*of_jobs, *of_bundles]) == sorted(state.tasks), "each live task belongs to one job or bundle")
    for task in state.tasks.values():
        _must(
            (task.lease_id is not None) == (task.phase is TaskPhase.LEASED), "leased tasks, and no other, have leases"
        )
        _must(task.lease_id is None or task.lease_id in state.leases, "a task's lease is live")
        _must(task.attempts < TASK_ATTEMPTS_MAX and task.losses < TASK_LOSSES_MAX, "nothing is tried for ever")
        if task.kind is TaskKind.MAP and task.phase in (TaskPhase.READY, TaskPhase.LEASED):
            _must(task.input is not None, "what can be leased is packed")


def _check_groups(state: State) -> None:
    seen: dict[GroupKey, list[tuple[int, str]]] = {}
    for worker_id, worker in state.workers.items():
        placed = worker.session_id is not None and not worker.quarantined
        _must(worker.groups == (groups_of_worker(worker) if placed else ()), "a worker counts where it belongs")
        _must(len(worker.leases) <= max(worker.window, len(worker.leases)) and worker.free >= 0, "windows are kept")
        for key in worker.groups:
            seen.setdefault(key, [])
            if worker.free:
                seen[key].append((worker.load, worker_id))
    _must(set(seen) == set(state.groups), "groups are those of connected workers")
    for key, free in seen.items():
        group = state.groups[key]
        members = [state.workers[worker_id] for worker_id in group.members]
        _must(group.free == sorted(free), "free workers stand in their group")
        _must(group.free_total == sum(worker.free for worker in members), "free windows are counted")
        _must(group.window_total == sum(worker.window for worker in members), "windows are counted")
        _must(group.ahead_total == sum(min(w.slots, w.window) for w in members), "slots are counted")


def _check_lanes(state: State) -> None:
    jobs: Counter[LaneKey] = Counter(job.lane for job in state.jobs.values() if job.state not in JOB_STATES_FINAL)
    jobs.update(task.lane for task in state.tasks.values() if task.job_id is None)
    _must(dict(jobs) == {key: lane.jobs for key, lane in state.lanes.items()}, "a lane counts its work")
    for key, lane in state.lanes.items():
        tasks = [task for task in state.tasks.values() if task.lane == key]
        standing = [t for t in tasks if t.job_id is None or not state.jobs[t.job_id].parked]
        waiting = [(t.not_before_ms, t.number, t.task_id) for t in standing if t.phase is TaskPhase.WAITING]
        _must(sorted(waiting) == lane.waiting, "waiting tasks stand in their lane")
        packing = {task.task_id for task in tasks if task.phase is TaskPhase.PACKING}
        _must(packing == set(lane.packing), "tasks in packing stand in their lane")
        ready = {task.task_id for task in standing if task.phase is TaskPhase.READY}
        _must(ready == set(lane.ready), "ready tasks stand in their lane")
        queued = {job_id for queue in lane.accounts.values() for job_id in queue}
        cuttable = {
            job_id
            for job_id, job in state.jobs.items()
            if job.lane == key and job.state in (JobState.QUEUED, JobState.RUNNING) and job.next_row < job.rows
        }
        _must(queued == cuttable and all(lane.accounts.values()), "jobs with rows to cut stand in their lane")


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
