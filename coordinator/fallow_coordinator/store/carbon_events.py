"""Forecasts, plans for clean electricity, jobs that wait: their events ↔ protobuf."""

from __future__ import annotations

from fallow.ids import JobId
from fallow.journal.v1 import journal_pb2 as pb
from fallow_coordinator.core import events as ev
from fallow_coordinator.store.event_kind import AnyKind, Kind

KINDS: tuple[AnyKind, ...] = (
    Kind(
        "forecasts_recorded",
        ev.ForecastsRecorded,
        lambda event: pb.ForecastsRecorded(
            from_ms=event.from_ms,
            forecasts=[
                pb.RegionForecast(region=told.region, grams_per_kwh=told.grams_per_kwh) for told in event.forecasts
            ],
            source=event.source,
        ),
        lambda message: ev.ForecastsRecorded(
            from_ms=message.from_ms,
            forecasts=tuple([ev.RegionForecast(told.region, tuple(told.grams_per_kwh)) for told in message.forecasts]),
            source=message.source,
        ),
    ),
    Kind(
        "carbon_planned",
        ev.CarbonPlanned,
        lambda event: pb.CarbonPlanned(job_id=event.job_id, regions_closed=event.regions_closed),
        lambda message: ev.CarbonPlanned(JobId(message.job_id), tuple(message.regions_closed)),
    ),
    Kind(
        "job_deferred",
        ev.JobDeferred,
        lambda event: pb.JobDeferred(job_id=event.job_id, until_ms=event.until_ms),
        lambda message: ev.JobDeferred(JobId(message.job_id), message.until_ms),
    ),
    Kind(
        "job_resumed",
        ev.JobResumed,
        lambda event: pb.JobResumed(job_id=event.job_id),
        lambda message: ev.JobResumed(JobId(message.job_id)),
    ),
)
