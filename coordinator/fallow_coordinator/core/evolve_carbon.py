"""How events about carbon change the state: forecasts, closed regions, jobs that wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import assert_never

from fallow.ids import JobId
from fallow_coordinator.core import events as e
from fallow_coordinator.core.carbon import Forecast
from fallow_coordinator.core.lanes import CUTTABLE, close_regions, join_queue, leave_queue, wants_cutting
from fallow_coordinator.core.parking import park, unpark
from fallow_coordinator.core.state import Job, State

CarbonEvent = e.ForecastsRecorded | e.CarbonPlanned | e.JobDeferred | e.JobResumed


def evolve_carbon(state: State, event: CarbonEvent, at_ms: int) -> None:
    """Applies one event about carbon."""
    match event:
        case e.ForecastsRecorded():
            state.forecasts = {told.region: Forecast(event.from_ms, told.grams_per_kwh) for told in event.forecasts}
            state.forecast_source = event.source
            # Who waits is planned anew at the next tick.
            state.carbon_planned_at_ms = 0
        case e.CarbonPlanned():
            state.carbon_planned_at_ms = at_ms
            close_regions(state, state.jobs[event.job_id].lane, frozenset(event.regions_closed))
        case e.JobDeferred():
            _defer(state, state.jobs[event.job_id], event.until_ms)
        case e.JobResumed():
            _resume(state, state.jobs[event.job_id])
        case _:
            assert_never(event)


def _defer(state: State, job: Job, until_ms: int) -> None:
    assert until_ms > 0 and job.state in CUTTABLE, "what could run waits, until some moment"
    if job.deferred_until_ms:
        _forget(state, job.deferred_until_ms, job.job_id)
    else:
        if wants_cutting(job):
            leave_queue(state, job)
        park(state, job)
    job.deferred_until_ms = until_ms
    insort(state.deferred, (until_ms, job.job_id))


def _resume(state: State, job: Job) -> None:
    assert job.deferred_until_ms, "what waits goes on"
    forget_deferral(state, job)
    unpark(state, job)
    if wants_cutting(job):
        join_queue(state, job)


def forget_deferral(state: State, job: Job) -> None:
    """The job waits for clean electricity no more; its tasks stay parked."""
    if job.deferred_until_ms:
        _forget(state, job.deferred_until_ms, job.job_id)
        job.deferred_until_ms = 0


def _forget(state: State, until_ms: int, job_id: JobId) -> None:
    entry = (until_ms, job_id)
    index = bisect_left(state.deferred, entry)
    assert state.deferred[index] == entry, "a job that waits stands in the index"
    del state.deferred[index]
