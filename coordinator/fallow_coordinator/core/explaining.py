"""Why a job waits and why a worker has no work: questions to the state, answered with the very rules of matching."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from fallow.explanation import JobExplanation, Obstacle, WorkerExplanation
from fallow.ids import JobId, PartyId
from fallow.job import JOB_STATES_FINAL, JobState, JobStatus
from fallow.session import TaskKind
from fallow_coordinator.core.groups import ability_of_worker
from fallow_coordinator.core.limits import SECOND_MS
from fallow_coordinator.core.needs import MISFIT_WORDS, Misfit, Needs, misfit
from fallow_coordinator.core.shares import usage_units
from fallow_coordinator.core.state import Job, State, TaskPhase, Worker
from fallow_coordinator.core.waiting import BUSY, NO_WORKER, PACKING, waiting_reason

_CHECKED = tuple(Misfit)
_BUSY_OR_FREE = frozenset({None, Misfit.BUSY})
_ADVICE = {
    "NO_OPERATOR_WORKER": "the operator starts one: `fallow-coordinator start` launches it beside itself",
}


def unfit(state: State, needs: Needs, worker: Worker) -> Misfit | None:
    """Why this worker cannot take such work, ever or now; None when it is free for it."""
    if state.parties[worker.worker_id].revoked:
        return Misfit.REVOKED
    if worker.quarantined:
        return Misfit.QUARANTINED
    reason = misfit(needs, ability_of_worker(state, worker))
    if reason is not None:
        return reason
    return idle_reason(worker)


def idle_reason(worker: Worker) -> Misfit | None:
    """Why a worker that fits takes nothing now; None when it has room."""
    if worker.session_id is None:
        return Misfit.AWAY
    if worker.cooling_until_ms:
        return Misfit.COOLING_DOWN
    if not worker.window:
        return Misfit.WINDOW_CLOSED
    return None if worker.free else Misfit.BUSY


def explain_job(state: State, job_id: JobId, now_ms: int) -> JobExplanation | None:
    """The job as the matching sees it, or None when it is not (any more) in the state. Costs a look at every worker."""
    job = state.jobs.get(job_id)
    if job is None:
        return None
    found: Counter[Misfit | None] = Counter()
    for worker in state.workers.values():
        if not state.parties[worker.worker_id].revoked:
            found[unfit(state, job.lane, worker)] += 1
    accounts_before, jobs_before = _places(state, job)
    return JobExplanation(
        job_id=job_id,
        state=job.state,
        workers_considered=found.total(),
        workers_fitting=sum(count for reason, count in found.items() if reason in _BUSY_OR_FREE),
        workers_free=found[None],
        fallen_out=_counted({reason: n for reason, n in found.items() if reason not in _BUSY_OR_FREE}),
        waits_for=_waits_for(state, job, found, accounts_before, jobs_before),
        accounts_before=accounts_before,
        jobs_before=jobs_before,
        usage_units=usage_units(state.accounts[job.account_id].share_key, now_ms),
    )


def explain_ended(status: JobStatus) -> JobExplanation:
    """A job that has left the state: there is nothing to match any more."""
    words = f"it is {status.state.value}{': ' + status.reason if status.reason else ''}"
    return JobExplanation(
        job_id=status.job_id,
        state=status.state,
        workers_considered=0,
        workers_fitting=0,
        workers_free=0,
        fallen_out=(),
        waits_for=(Obstacle("ENDED", 0, words),),
        accounts_before=0,
        jobs_before=0,
        usage_units=0,
    )


def explain_worker(state: State, worker_id: PartyId, now_ms: int) -> WorkerExplanation | None:
    """The worker as the matching sees it, or None when there is none. Costs a look at every lane."""
    worker = state.workers.get(worker_id)
    if worker is None:
        return None
    ability = ability_of_worker(state, worker)
    found: Counter[Misfit | None] = Counter()
    fitting: list[Needs] = []
    for needs, lane in state.lanes.items():
        if needs.kind is TaskKind.MAP:
            reason = misfit(needs, ability)
            found[reason] += lane.jobs
            if reason is None:
                fitting.append(needs)
    return WorkerExplanation(
        worker_id=worker_id,
        connected=worker.session_id is not None,
        leases=len(worker.leases),
        window=worker.window,
        room=worker.room,
        strikes=worker.strikes,
        jobs_considered=found.total(),
        jobs_fitting=found[None],
        fallen_out=_counted({reason: n for reason, n in found.items() if reason is not None}),
        reasons=tuple(_why_idle(state, worker, fitting, found, now_ms)),
    )


def _counted(found: dict[Misfit | None, int]) -> tuple[Obstacle, ...]:
    ordered = sorted(((reason, n) for reason, n in found.items() if reason is not None and n), key=lambda e: -e[1])
    return tuple(Obstacle(reason.value, n, *MISFIT_WORDS[reason]) for reason, n in ordered)


def _places(state: State, job: Job) -> tuple[int, int]:
    """Accounts and jobs that come before it in its lane."""
    lane = state.lanes.get(job.lane)
    if lane is None or job.account_id not in lane.accounts:
        return 0, 0
    accounts = bisect_left(lane.queue, (state.accounts[job.account_id].share_key, job.account_id))
    jobs = bisect_left(lane.accounts[job.account_id], (job.due_ms, job.number, job.job_id))
    return accounts, jobs


def _waits_for(
    state: State, job: Job, found: Counter[Misfit | None], accounts_before: int, jobs_before: int
) -> tuple[Obstacle, ...]:
    if job.state in JOB_STATES_FINAL:
        return (Obstacle("ENDED", 0, f"it is {job.state.value}{': ' + job.reason if job.reason else ''}"),)
    if job.state is JobState.PAUSED:
        return (Obstacle(job.reason_code or "PAUSED", 0, f"it is paused{': ' + job.reason if job.reason else ''}"),)
    if job.state is JobState.PENDING:
        words, code = waiting_reason(state, job.job_id)
        return (Obstacle(code, 0, words, _ADVICE.get(code, "")),)
    if job.state is JobState.VERIFYING:
        words, code = waiting_reason(state, job.job_id)
        return (Obstacle(code, 0, words),)
    made: list[Obstacle] = []
    fitting = sum(found[reason] for reason in _BUSY_OR_FREE)
    if not fitting:
        made.append(_nobody_fits(found))
    elif not found[None]:
        made.append(Obstacle(BUSY, fitting, "all workers that fit are busy", "wait, or add workers"))
    if fitting and accounts_before:
        words = f"{accounts_before} accounts were served less lately and come first"
        made.append(Obstacle("SHARE", accounts_before, words, "wait: each account has its turn"))
    if fitting and jobs_before:
        advice = "submit urgent work with --priority or --deadline"
        made.append(Obstacle("DUE", jobs_before, f"{jobs_before} jobs of this account are due earlier", advice))
    made.extend(_of_its_tasks(state, job))
    return tuple(made)


def _nobody_fits(found: Counter[Misfit | None]) -> Obstacle:
    if not found.total():
        return Obstacle(NO_WORKER, 0, "no worker is enrolled", "issue a join token and start workers")
    # Who only has to come, wake or recover is nearer than who can never do it.
    nearest = (Misfit.COOLING_DOWN, Misfit.WINDOW_CLOSED, Misfit.AWAY)
    near = next((reason for reason in nearest if found[reason]), None)
    # Among as many, who passed more of the checks is nearer.
    reason = near or max((r for r in found if r is not None), key=lambda r: (found[r], _CHECKED.index(r)))
    words, advice = MISFIT_WORDS[reason]
    return Obstacle(NO_WORKER, 0, f"no worker can take it now; of {found[reason]}: {words}", advice)


def _of_its_tasks(state: State, job: Job) -> list[Obstacle]:
    tasks = [state.tasks[task_id] for task_id in job.tasks]
    made: list[Obstacle] = []
    packing = sum(task.phase is TaskPhase.PACKING for task in tasks)
    if packing:
        made.append(Obstacle(PACKING, packing, f"{packing} tasks are being packed"))
    doubled = sum(task.duplicate_id is not None for task in tasks)
    if doubled:
        words = f"{doubled} late tasks are in the hands of a second worker too: who is done first delivers"
        made.append(Obstacle("LATE", doubled, words))
    failed = [task for task in tasks if task.phase is TaskPhase.WAITING and task.last_reason]
    if failed:
        words = f"{len(failed)} tasks wait to be tried again, the last one ended: {failed[-1].last_reason}"
        made.append(Obstacle("RETRY", len(failed), words))
    return made


def _why_idle(
    state: State, worker: Worker, fitting: list[Needs], found: Counter[Misfit | None], now_ms: int
) -> list[Obstacle]:
    """Why the worker has no more to do, the strongest first."""
    if state.parties[worker.worker_id].revoked:
        return [_about(Misfit.REVOKED)]
    if worker.quarantined:
        return [_about(Misfit.QUARANTINED, worker.quarantine_reason)]
    reason = idle_reason(worker)
    if worker.distrusted_reason and found[Misfit.DISTRUSTED] and not fitting:
        return [_about(Misfit.DISTRUSTED, worker.distrusted_reason)]
    if reason is Misfit.COOLING_DOWN:
        left_s = max(0, worker.cooling_until_ms - now_ms) // SECOND_MS
        return [_about(reason, f"{worker.strikes} strikes, {left_s} seconds left")]
    if reason is Misfit.BUSY:
        return [Obstacle("WORKING", len(worker.leases), "it has as much work as it takes")]
    if reason is not None:
        return [_about(reason)]
    if not found.total():
        return [Obstacle("NO_JOBS", 0, "no job is unfinished anywhere", "wait: work comes when somebody submits")]
    if not fitting:
        return [Obstacle("NO_FIT", found.total(), "no unfinished job can use this worker; the counts say why")]
    stands = [state.lanes[needs] for needs in fitting]
    if any(lane.ready or lane.packing or lane.waiting or lane.queue for lane in stands):
        return [Obstacle("COMING", found[None], "work that fits is being packed, or rests before it is tried again")]
    return [Obstacle("ALL_GIVEN_OUT", found[None], "all rows that fit are given out", "wait for the next job")]


def _about(reason: Misfit, more: str = "") -> Obstacle:
    words, advice = MISFIT_WORDS[reason]
    return Obstacle(reason.value, 0, f"{words}: {more}" if more else words, advice)
