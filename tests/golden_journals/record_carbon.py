"""Records the golden journal `carbon`: `python record_carbon.py NAME`, for a NEW name, as `record.py` says."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow.job import Objective  # noqa: E402
from fallow.session import EnergySource, Usage  # noqa: E402
from fallow_coordinator.core import commands as c  # noqa: E402
from fallow_coordinator.core import events as e  # noqa: E402
from fallow_coordinator.core.carbon import ELSEWHERE  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord  # noqa: E402
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore  # noqa: E402
from golden_journals.record import ROWS, write  # noqa: E402
from journal_world import World, WorldWorker  # noqa: E402

HOUR_MS = 3_600_000


async def commit(world: World, worker: WorldWorker, usage: Usage) -> None:
    command, block = world.commit_command(worker, world.leases_of(worker)[0])
    await world.tell(replace(command, usage=usage), {command.output.digest: block})


async def record() -> list[StoredRecord]:
    """Energy measured and estimated, a job that waits for a clean hour, is cut, waits again and ends."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector, unit_micros_per_row=60_000_000)
    start_ms = world.clock.now_ms = world.clock.now_ms - world.clock.now_ms % HOUR_MS + HOUR_MS
    curve = (400, 400, 100, 400, 100, *[400] * 40)
    forecasts = (e.RegionForecast("de", curve), e.RegionForecast(ELSEWHERE, (481,) * 45))
    await world.tell(c.RecordForecasts(start_ms, forecasts, "a test"))
    first = await world.volunteer("first", window=1)
    here = replace(first.capability, region="de")
    await world.tell(c.ChangeCapability(first.session_id, here, 1))
    second = await world.volunteer("second", window=1)
    await world.submit_job(ROWS[:8], title="clean", objective=Objective.CARBON)
    for hour in range(1, 8):
        await world.tell(c.Tick())
        if world.leases_of(first):
            await commit(world, first, Usage(1_000, 900, energy_joules=12.5, energy_source=EnergySource.MEASURED))
        world.clock.now_ms = start_ms + hour * HOUR_MS
    await world.submit_job(ROWS[:8], title="any hour")
    while world.leases_of(first) or world.leases_of(second):
        for worker, source in ((first, EnergySource.MEASURED), (second, EnergySource.ESTIMATED)):
            if world.leases_of(worker):
                await commit(world, worker, Usage(1_000, 900, energy_joules=2.0, energy_source=source))
    await world.engine.stop()
    return disk.records


if __name__ == "__main__":
    write(sys.argv[1], record())
