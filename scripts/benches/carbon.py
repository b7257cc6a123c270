"""A simulated week of jobs with deadlines: grams of CO₂ under `objective=carbon` against `objective=cost`.

The real core decides (`take_turn`, virtual time); workers are stubs that take as long as rows cost and spend so many
watts. The same jobs come at the same moments with the same deadlines to the same workers under both objectives. Grams
are counted here, over the very seconds that each task ran, not taken from receipts.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import heapq
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scripts.benches.report import Report, say

from fallow.ids import JobId, LeaseId, PartyId
from fallow.job import JobOptions, Objective
from fallow.session import EnergySource, Usage
from fallow_coordinator.carbon.keeper import forecasts
from fallow_coordinator.carbon.table import SYNTHETIC, CarbonTable, read_table

SAVED_PERCENT_MIN = 30.0
HOUR_MS, MINUTE_MS = 3_600_000, 60_000
HOURS_OF_RUN = 7 * 24 + 60
"""A week of arrivals, and time for the last deadlines."""
UNITS_PER_ROW = 600
"""A row is ten minutes of a reference core, so that a week has thousands of tasks, not millions."""
WATTS_PER_CORE = 12.0
SEASONS = {"winter": (1, 12), "spring": (4, 13), "summer": (7, 13), "autumn": (10, 12)}
"""Mondays of 2026 from which a week is taken."""
DEADLINES_H = ((6, 0.2), (12, 0.2), (24, 0.4), (48, 0.2))
"""Hours until the deadline and how many jobs have it."""
BY_HOUR = (2, 2, 1, 1, 1, 1, 2, 4, 7, 9, 9, 8, 7, 8, 9, 9, 8, 6, 5, 4, 4, 3, 3, 2)
"""How many jobs come in each hour of the day, relative to one another (UTC)."""


def options(parser: argparse.ArgumentParser) -> None:
    """What can be changed."""
    parser.add_argument("--regions", default="de,gb,es,us", help="where workers are, with commas")
    parser.add_argument("--alone", default="de,gb,us", help="regions in which time alone is tried, with commas")
    parser.add_argument("--workers", type=int, default=8, help="workers in each region, one core each")
    parser.add_argument("--load", type=float, default=0.25, help="share of the workers' time that jobs ask for")
    parser.add_argument("--seasons", default=",".join(SEASONS), help="weeks to simulate, with commas")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--curves", type=Path, help="a carbon table (CSV); default: the synthetic one")


async def measure(chosen: argparse.Namespace) -> Report:
    """Every season's week under both objectives, then regions alone."""
    table = await asyncio.to_thread(read_table, chosen.curves) if chosen.curves else SYNTHETIC
    regions, seasons = chosen.regions.split(","), chosen.seasons.split(",")
    weeks = {season: compared(table, regions, season, chosen) for season in seasons}
    alone = {region: compared(table, [region], seasons[-1], chosen) for region in chosen.alone.split(",") if region}
    cost, carbon = _sum(weeks, "cost"), _sum(weeks, "carbon")
    saved = _saved(cost["grams"], carbon["grams"])
    equal = abs(cost["joules"] - carbon["joules"]) <= 1e-6 * cost["joules"]
    kept = carbon["deadlines_missed"] <= cost["deadlines_missed"]
    unfinished = cost["jobs_unfinished"] + carbon["jobs_unfinished"]
    facts: dict[str, Any] = {
        "grams_saved_percent": round(saved, 1),
        "budget_percent": SAVED_PERCENT_MIN,
        "holds": saved >= SAVED_PERCENT_MIN and equal and kept and not unfinished,
        "cost": cost,
        "carbon": carbon,
        "energy_equal": equal,
        "weeks": {
            season: {"saved_percent": round(_saved(found["cost"]["grams"], found["carbon"]["grams"]), 1), **found}
            for season, found in weeks.items()
        },
        "time_alone": {
            region: {
                "saved_percent": round(_saved(found["cost"]["grams"], found["carbon"]["grams"]), 1),
                "deadlines_missed": found["carbon"]["deadlines_missed"],
            }
            for region, found in alone.items()
        },
        "regions": regions,
        "workers_per_region": chosen.workers,
        "load": chosen.load,
        "seed": chosen.seed,
        "curves": table.label,
        "synthetic": [
            *(["grams per kWh: " + table.label] if table.is_synthetic else []),
            "jobs: arrivals by hour of day, lengths and deadlines drawn from the seed",
            f"workers: stubs of one reference core and {WATTS_PER_CORE:g} W, never away",
            "forecasts: the curves themselves, so they are never wrong",
        ],
    }
    return Report(facts, ["a job did not end"] if unfinished else [])


def compared(table: CarbonTable, regions: list[str], season: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One week under both objectives."""
    month, day = SEASONS[season]
    start_ms = int(datetime.datetime(2026, month, day, tzinfo=datetime.UTC).timestamp() * 1_000)
    jobs = arrivals(chosen.seed, cores=len(regions) * chosen.workers, load=chosen.load)
    found: dict[str, Any] = {}
    for objective in (Objective.COST, Objective.CARBON):
        week = Week(table, regions, chosen.workers, start_ms, objective)
        found[objective.value] = week.run(jobs)
        say(f"{season} {'+'.join(regions)} {objective.value}: {found[objective.value]}")
    return found


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job to come."""

    at_ms: int
    """After the start."""
    rows: int
    deadline_h: int


def arrivals(seed: int, *, cores: int, load: float) -> list[Arrival]:
    """A week of jobs that ask for this share of so many cores; lengths from 20 minutes to 8 hours of one core."""
    drawn = random.Random(seed)
    rows_wanted = int(cores * load * 7 * 24 * 3_600 / UNITS_PER_ROW)
    jobs: list[Arrival] = []
    while rows_wanted > 0:
        rows = min(48, max(2, round(drawn.lognormvariate(2.2, 0.8))))
        hour = drawn.choices(range(24), BY_HOUR)[0]
        at_ms = (drawn.randrange(7) * 24 + hour) * HOUR_MS + drawn.randrange(HOUR_MS)
        deadline = drawn.choices([hours for hours, _ in DEADLINES_H], [share for _, share in DEADLINES_H])[0]
        jobs.append(Arrival(at_ms, rows, deadline))
        rows_wanted -= rows
    return sorted(jobs, key=lambda job: job.at_ms)


@dataclass
class Week:
    """The core, its workers and the clock."""

    table: CarbonTable
    regions: list[str]
    workers: int
    start_ms: int
    objective: Objective
    grams: float = 0.0
    joules: float = 0.0
    due: dict[JobId, int] = field(default_factory=dict)
    ends: list[tuple[int, int, LeaseId, int]] = field(default_factory=list)
    """(end, number, lease, begin) of running tasks."""

    def run(self, jobs: list[Arrival]) -> dict[str, Any]:
        """Lets the week pass; what it came to."""
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
        from fallow_coordinator.core import commands as c
        from simulation.core_world import World, capability

        world = World(now_ms=self.start_ms - HOUR_MS, checks=lambda state: None).start()
        world.ready_bundle(per_row=UNITS_PER_ROW * 1_000_000, batch=1)
        self._world = world
        self._told = -1
        world.now_ms = self.start_ms
        token = world.token(valid_for_ms=30 * 24 * HOUR_MS)
        for region in self.regions:
            for number in range(self.workers):
                party = world.enroll(f"{region}-{number}", token)
                world.connect(party.party_id, window=1, able=replace(capability(), region=region))
        coming = [(self.start_ms + job.at_ms, number, job) for number, job in enumerate(jobs)]
        heapq.heapify(coming)
        end_ms = self.start_ms + HOURS_OF_RUN * HOUR_MS
        next_tick_ms = self.start_ms
        while world.now_ms < end_ms:
            at_ms = min([next_tick_ms, *(queue[0][0] for queue in (coming, self.ends) if queue)])
            world.now_ms = max(world.now_ms, at_ms)
            if at_ms == next_tick_ms:
                next_tick_ms += MINUTE_MS
                self._forecast(c)
                world.take(c.Tick())
            elif coming and at_ms == coming[0][0]:
                _, number, job = heapq.heappop(coming)
                deadline_ms = world.now_ms + job.deadline_h * HOUR_MS
                asked = JobOptions(objective=self.objective, deadline_ms=deadline_ms)
                self.due[world.submit(job.rows, key=f"job {number}", options=asked)] = deadline_ms
                # The tick that follows within a quarter of a second.
                world.take(c.Tick())
            else:
                self._finish()
            world.pack_all()
            self._begin()
        return self._found()

    def _forecast(self, c: Any) -> None:
        hour = self._world.now_ms // HOUR_MS
        if hour != self._told:
            self._told = hour
            command = forecasts(self.table, tuple(self.regions), self._world.now_ms)
            self._world.take(c.RecordForecasts(command.from_ms, command.forecasts, command.source))

    def _begin(self) -> None:
        """Leases that nobody works on yet begin."""
        known = {lease_id for _, _, lease_id, _ in self.ends}
        state = self._world.state
        for lease_id, lease in state.leases.items():
            if lease_id not in known:
                took_ms = state.tasks[lease.task_id].unit_micros // 1_000
                entry = (self._world.now_ms + took_ms, len(self._world.records), lease_id, self._world.now_ms)
                heapq.heappush(self.ends, entry)

    def _finish(self) -> None:
        end_ms, _, lease_id, begin_ms = heapq.heappop(self.ends)
        lease = self._world.state.leases[lease_id]
        seconds = (end_ms - begin_ms) / 1_000
        self.joules += seconds * WATTS_PER_CORE
        self.grams += self._emitted(lease.worker_id, begin_ms, end_ms)
        usage = Usage(energy_joules=seconds * WATTS_PER_CORE, energy_source=EnergySource.ESTIMATED)
        self._world.take(self._world.commit_command(lease, usage=usage))

    def _emitted(self, worker_id: PartyId, begin_ms: int, end_ms: int) -> float:
        """Grams of one core's watts over these seconds, hour by hour."""
        region = self._world.state.workers[worker_id].capability.region
        total, at_ms = 0.0, begin_ms
        while at_ms < end_ms:
            until_ms = min(end_ms, (at_ms // HOUR_MS + 1) * HOUR_MS)
            kilowatt_hours = WATTS_PER_CORE / 1_000 * (until_ms - at_ms) / HOUR_MS
            total += kilowatt_hours * (self.table.grams(region, at_ms) or 0)
            at_ms = until_ms
        return total

    def _found(self) -> dict[str, Any]:
        jobs = self._world.state.jobs
        ended = [job_id for job_id in self.due if jobs[job_id].finished_at_ms]
        late = [job_id for job_id in ended if jobs[job_id].finished_at_ms > self.due[job_id]]
        hours = [(jobs[job_id].finished_at_ms - jobs[job_id].submitted_at_ms) / HOUR_MS for job_id in ended]
        receipts = sum(jobs[job_id].footprint.micrograms for job_id in self.due) / 1e6
        return {
            "grams": round(self.grams, 1),
            "grams_on_receipts": round(receipts, 1),
            "joules": round(self.joules, 1),
            "jobs": len(self.due),
            "jobs_unfinished": len(self.due) - len(ended),
            "deadlines_missed": len(late),
            "hours_until_done_mean": round(sum(hours) / max(1, len(hours)), 2),
        }


def _sum(weeks: dict[str, Any], objective: str) -> dict[str, Any]:
    found = [week[objective] for week in weeks.values()]
    summed = {key: round(sum(each[key] for each in found), 1) for key in found[0] if key != "hours_until_done_mean"}
    mean = sum(each["hours_until_done_mean"] for each in found) / len(found)
    return {**summed, "hours_until_done_mean": round(mean, 2)}


def _saved(before: float, after: float) -> float:
    return 100 * (1 - after / before) if before else 0.0
