"""Decisions about waiting for clean electricity: what is forecast, which jobs wait, which regions get no such work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from fallow.errors import FallowError, Reason
from fallow.ids import JobId
from fallow.job import Objective
from fallow_coordinator.core import commands as c
from fallow_coordinator.core import events as e
from fallow_coordinator.core.answers import Decision
from fallow_coordinator.core.carbon import Demand, grams_at, plan
from fallow_coordinator.core.cutting import Layout, cost_of, unit_micros
from fallow_coordinator.core.lanes import CUTTABLE
from fallow_coordinator.core.limits import (
    CARBON_PATIENCE_MS,
    FORECAST_GRAMS_PER_KWH_MAX,
    FORECAST_HOURS_MAX,
    FORECAST_REGIONS_MAX,
    HOUR_MS,
    PLAN_EVERY_MS,
    PLANNED_JOBS_MAX,
    UNIT_MICROS,
)
from fallow_coordinator.core.needs import Needs, misfit
from fallow_coordinator.core.state import Job, State

Waiting = e.JobDeferred | e.JobResumed | e.CarbonPlanned
_OTHERS_SHARE = 2
"""Work of each other account that is taken to go first, as a multiple of what waits: fair share gives no more."""


def record_forecasts(state: State, command: c.RecordForecasts) -> Decision:
    """The coming hours' grams per kWh, where they changed. Raises FIELD_INVALID, LIMIT_EXCEEDED."""
    if len(command.forecasts) > FORECAST_REGIONS_MAX:
        raise FallowError(
            Reason.LIMIT_EXCEEDED,
            f"{len(command.forecasts)} regions are forecast",
            field="forecasts",
            limit=f"{FORECAST_REGIONS_MAX} regions",
        )
    if command.from_ms < 0 or command.from_ms % HOUR_MS:
        raise FallowError(Reason.FIELD_INVALID, "a forecast begins with an hour", field="from_ms")
    for told in command.forecasts:
        grams = told.grams_per_kwh
        if not 1 <= len(grams) <= FORECAST_HOURS_MAX or not 0 <= min(grams) <= max(grams) <= FORECAST_GRAMS_PER_KWH_MAX:
            raise FallowError(
                Reason.FIELD_INVALID,
                f"the forecast of region {told.region!r} has {len(grams)} hours or absurd figures",
                field="forecasts.grams_per_kwh",
                limit=f"1 to {FORECAST_HOURS_MAX} hours of 0 to {FORECAST_GRAMS_PER_KWH_MAX} g/kWh",
            )
    event = e.ForecastsRecorded(command.from_ms, command.forecasts, command.source)
    known = {region: (found.from_ms, found.grams_per_kwh) for region, found in state.forecasts.items()}
    told_now = {told.region: (command.from_ms, told.grams_per_kwh) for told in command.forecasts}
    return Decision(() if known == told_now and state.forecast_source == command.source else (event,))


def held_back(state: State, job_id: JobId, objective: Objective, now_ms: int) -> tuple[e.Event, ...]:
    """A job that queues now and may wait is held back until the next tick has planned for it."""
    if objective is not Objective.CARBON or not state.forecasts:
        return ()
    return (e.JobDeferred(job_id=job_id, until_ms=now_ms),)


def planned(state: State, now_ms: int) -> list[Waiting]:
    """Who waits and who goes on, when it is time to say so again; nothing when nobody may wait."""
    if not state.carbon_jobs or not _is_time(state, now_ms):
        return []
    by_lane: dict[Needs, list[Job]] = {}
    for job_id in state.carbon_jobs:
        job = state.jobs[job_id]
        if job.state in CUTTABLE:
            by_lane.setdefault(job.lane, []).append(job)
    if not by_lane:
        return []
    work = {job.job_id: work_left(state, job) for job in state.jobs.values() if job.state in CUTTABLE}
    return [event for needs, jobs in by_lane.items() for event in _planned_lane(state, needs, jobs, work, now_ms)]


def _is_time(state: State, now_ms: int) -> bool:
    if state.deferred and state.deferred[0][0] <= now_ms:
        return True
    planned_at_ms = state.carbon_planned_at_ms
    return now_ms >= planned_at_ms + PLAN_EVERY_MS or now_ms // HOUR_MS != planned_at_ms // HOUR_MS


def _planned_lane(
    state: State, needs: Needs, jobs: list[Job], work: Mapping[JobId, int], now_ms: int
) -> Iterable[Waiting]:
    jobs = sorted(jobs, key=lambda job: (due_of(job), job.job_id))
    demands = [Demand(job.job_id, work[job.job_id], due_of(job)) for job in jobs[:PLANNED_JOBS_MAX]]
    made = plan(
        now_ms,
        state.forecasts,
        rooms_of(state, needs),
        demands,
        other_unit_micros=_others(state, needs, jobs, work),
    )
    for job in jobs:
        until_ms = made.waits_until_ms.get(job.job_id)
        if until_ms is not None and until_ms != job.deferred_until_ms:
            yield e.JobDeferred(job_id=job.job_id, until_ms=until_ms)
        elif until_ms is None and job.deferred_until_ms:
            yield e.JobResumed(job_id=job.job_id)
    yield e.CarbonPlanned(job_id=jobs[0].job_id, regions_closed=tuple(sorted(made.closed)))


def due_of(job: Job) -> int:
    """By when a job that may wait shall be done: its deadline, or a day after it came."""
    return job.options.deadline_ms or job.submitted_at_ms + CARBON_PATIENCE_MS


def rooms_of(state: State, needs: Needs) -> dict[str, int]:
    """Micro-units that the workers who fit do in an hour, by region."""
    rooms: Counter[str] = Counter()
    for group in state.groups.values():
        if misfit(needs, group.ability) is not None:
            continue
        for worker_id in group.members:
            worker = state.workers[worker_id]
            speed = worker.speed_milliunits_per_s or 1_000
            rooms[group.ability.region] += min(worker.slots, worker.room) * speed * (UNIT_MICROS // 1_000) * 3_600
    return dict(rooms)


def work_left(state: State, job: Job) -> int:
    """Micro-units of the rows that are not done."""
    report = state.bundles[job.bundle_digest].report
    live = sum(state.tasks[task_id].unit_micros for task_id in job.tasks)
    if report is None or job.next_row >= job.rows:
        return live
    layout = Layout(job.row_starts, job.byte_starts)
    return live + unit_micros(layout, cost_of(job, report), job.next_row, job.rows)


def _others(state: State, needs: Needs, jobs: list[Job], work: Mapping[JobId, int]) -> int:
    """Work of the same pool that is not of this lane, as far as fair share lets it go first."""
    mine = sum(work[job.job_id] for job in jobs)
    by_account: Counter[str] = Counter()
    for job_id, unit_micros_left in work.items():
        job = state.jobs[job_id]
        if job.pool_id == needs.pool_id and job.lane != needs:
            by_account[job.account_id] += unit_micros_left
    own = {job.account_id for job in jobs}
    return sum(left if account in own else min(left, _OTHERS_SHARE * mine) for account, left in by_account.items())


def why_deferred(state: State, job: Job, now_ms: int) -> str:
    """What a job waits for, in words; empty when it does not wait."""
    if not job.deferred_until_ms:
        return ""
    regions = rooms_of(state, job.lane)
    now = min((g for region in regions if (g := grams_at(state.forecasts, region, now_ms)) is not None), default=None)
    then = min(
        (g for region in regions if (g := grams_at(state.forecasts, region, job.deferred_until_ms)) is not None),
        default=None,
    )
    figures = f": {then} g/kWh then, {now} g/kWh now" if now is not None and then is not None else ""
    return f"it waits for cleaner electricity{figures}"
