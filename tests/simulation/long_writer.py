"""A writer over very many settled tasks, and what of its memory grows: `python long_writer.py --tasks 1000000`.

The real engine on a real SQLite journal, with payloads, packing and archiving; workers are a few lines each, and views
follow at once. `long_life` counts what the core's state holds; this shows what the process holds in all.
Prints one JSON object a sample; the last line tells the growth in MiB for a million tasks, the first half left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from fallow_coordinator.config import COLLECTOR_THRESHOLDS
from fallow_coordinator.core import commands as c
from fallow_coordinator.core.effects import Effect
from fallow_coordinator.store.sqlite import SqliteStore
from journal_world import QUIET, RecordingSink, World, WorldWorker
from simulation.long_life import resident_bytes

ROWS_PER_JOB = 400
TASKS_SPACED_MS = 5
TASK_UNIT_MICROS_PER_ROW = 30_000_000


class ForgetfulSink(RecordingSink):
    """Sends to nobody."""

    def apply(self, effects: Sequence[Effect]) -> None:
        """Nothing is kept."""


async def begun(folder: Path, workers: int) -> tuple[World, list[WorldWorker]]:
    """A world on a journal in `folder`, with so many volunteers."""
    store = SqliteStore(folder)
    world = World(store=store, sink=ForgetfulSink(), settings=replace(QUIET, batch_ms_max=16.0))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector, unit_micros_per_row=TASK_UNIT_MICROS_PER_ROW)
    await world.tell(c.CloseSession(inspector.session_id, "done"))
    return world, [await world.volunteer(f"volunteer {number}") for number in range(workers)]


async def one_job(world: World, workers: Sequence[WorldWorker], number: int, rows: int = ROWS_PER_JOB) -> int:
    """Submits a job, works it off and lets it leave; gives how many tasks it had."""
    before = world.engine.state.tasks_created
    await world.submit_job(
        [b"row %d of job %d" % (row, number) for row in range(rows)], key=b"key of job %06d" % number
    )
    while held := [(worker, lease) for worker in workers for lease in world.leases_of(worker)]:
        world.clock.now_ms += TASKS_SPACED_MS * len(held)
        await asyncio.gather(*[world.commit(worker, lease) for worker, lease in held])
    await world.tell(c.Tick())
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    return world.engine.state.tasks_created - before


async def grown(folder: Path, tasks: int, workers: int, samples: int) -> list[dict[str, Any]]:
    """A sample after each part of the tasks."""
    world, fleet = await begun(folder, workers)
    settled, jobs, began_s, found = 0, 0, time.monotonic(), list[dict[str, Any]]()
    for step in range(1, samples + 1):
        while settled < tasks * step // samples:
            settled += await one_job(world, fleet, jobs)
            jobs += 1
        gc.collect()
        found.append(
            {
                "settled": settled,
                "resident_mib": round(resident_bytes() / (1 << 20), 1),
                "elapsed_s": round(time.monotonic() - began_s, 1),
                "records": world.engine.state.sequence,
                "jobs_in_state": len(world.engine.state.jobs),
            }
        )
        sys.stdout.write(json.dumps(found[-1]) + "\n")
        sys.stdout.flush()
    await world.engine.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10)
    options = parser.parse_args()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)
    with tempfile.TemporaryDirectory(prefix="fallow-writer-") as folder:
        found = asyncio.run(grown(Path(folder), options.tasks, options.workers, options.samples))
    half = found[len(found) // 2 :]
    growth = (half[-1]["resident_mib"] - half[0]["resident_mib"]) / max(1, half[-1]["settled"] - half[0]["settled"])
    sys.stdout.write(json.dumps({"mib_per_million_tasks": round(1e6 * growth, 1)}) + "\n")


if __name__ == "__main__":
    main()
