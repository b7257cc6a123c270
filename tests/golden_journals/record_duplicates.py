"""Records the golden journal of tasks in two hands: `python record_duplicates.py NAME`. See `record.py`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow.credits import PoolMode  # noqa: E402
from fallow_coordinator.core import commands as c  # noqa: E402
from fallow_coordinator.core import groups  # noqa: E402
from fallow_coordinator.core.events import Agreement, Event, LateLeaseSettled, LeaseGranted  # noqa: E402
from fallow_coordinator.store.encoding import decode_event  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord  # noqa: E402
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore  # noqa: E402
from golden_journals.record import write  # noqa: E402
from journal_world import World, WorldWorker  # noqa: E402

ROWS = [f"row {number}".encode() for number in range(8)]


async def late(world: World, slow: WorldWorker, quick: WorldWorker) -> None:
    """Whatever the slow one holds is given to the quick one as well."""
    for _ in range(10):
        if all(world.engine.state.tasks[lease.task_id].duplicate_id for lease in world.leases_of(slow)):
            return
        world.clock.now_ms += 20_000
        await world.tell(c.Tick())


async def two_hands(world: World, slow: WorldWorker, quick: WorldWorker, budget: int) -> None:
    """A job whose only task is in two hands: the quick one delivers, the slow one is late."""
    await world.tell(c.ChangeCapability(quick.session_id, quick.capability, 0))
    await world.submit_job(ROWS, title="in two hands", budget_microcredits=budget)
    await world.tell(c.ChangeCapability(quick.session_id, quick.capability, 2))
    await late(world, slow, quick)


async def record() -> list[StoredRecord]:
    """Late leases that agree, that do not, that end with their job and after it, given and paid."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    await world.tell(c.DrainSession(inspector.session_id))
    slow, quick = await world.volunteer("slow", window=2), await world.volunteer("quick", window=2)
    account_id, pool_id = world.operator_account_id, world.engine.state.default_pool_id

    for number, budget in enumerate((0, 0, 20_000_000, 20_000_000)):
        if number == 2:
            await world.tell(c.SetPoolMode(pool_id, PoolMode.MARKET))
            await world.tell(c.GrantCredits(account_id, 90_000_000, "", world.entropy(16)))
            for worker, ask in ((slow, 300_000), (quick, 700_000)):
                worker.capability = replace(worker.capability, ask_microcredits_per_unit=ask)
                await world.tell(c.ChangeCapability(worker.session_id, worker.capability, 2))
        await two_hands(world, slow, quick, budget)
        for lease in world.leases_of(quick):
            await world.commit(quick, lease)
        for index, lease in enumerate(world.leases_of(slow)):
            await world.commit(slow, lease, fail_rows=[0] if index == number % 2 else [])
    await two_hands(world, slow, quick, 0)
    await world.submit_job(ROWS, title="to be cancelled", budget_microcredits=20_000_000)
    await late(world, slow, quick)
    for job in list(world.engine.state.jobs.values()):
        if job.title == "to be cancelled":
            await world.tell(c.CancelJob(account_id, job.job_id))
    for lease in world.leases_of(quick):
        await world.commit(quick, lease)
    world.clock.now_ms += 300_000
    await world.tell(c.Tick())
    await world.tell(c.ArchiveJobs(world.engine.state.sequence))
    await two_hands(world, slow, quick, 20_000_000)
    await world.engine.stop()
    check([decode_event(record.event) for record in disk.records])
    return disk.records


def check(events: list[Event]) -> None:
    settled = [event for event in events if isinstance(event, LateLeaseSettled)]
    assert {event.agreement for event in settled} >= {Agreement.SAME, Agreement.DIFFERENT}, settled
    assert any(event.microcredits for event in settled) and any(event.contribution_microcredits for event in settled)
    assert sum(isinstance(event, LeaseGranted) and event.duplicate for event in events) >= 5


def main() -> None:
    # How devices come to be measured is another journal's story.
    vars(groups)["measured"] = lambda worker: True
    write(sys.argv[1], record())


if __name__ == "__main__":
    main()
