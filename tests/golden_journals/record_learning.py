"""Records the golden journal of learned cost: `python record_learning.py NAME`. See `record.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fallow_coordinator.core import learning  # noqa: E402
from fallow_coordinator.core.events import TaskSettled  # noqa: E402
from fallow_coordinator.core.limits import LEARNED_SETTLEMENTS  # noqa: E402
from fallow_coordinator.store.journal_reader import StoredRecord, decode_records  # noqa: E402
from fallow_coordinator.store.memory import MemoryDisk, MemoryStore  # noqa: E402
from fallow_coordinator.store.segment import encode_segment  # noqa: E402
from golden_journals.facts import facts_of  # noqa: E402
from journal_world import World  # noqa: E402

ROWS = [f"row {number}".encode() for number in range(60)]


async def record() -> list[StoredRecord]:
    """Tasks turn out to be more work than inspection had said, and the next job knows."""
    disk = MemoryDisk()
    world = World(store=MemoryStore(disk))
    await world.begin()
    inspector = await world.operator_worker(window=1)
    await world.inspected_bundle(inspector)
    worker = await world.volunteer("first")
    for number in range(LEARNED_SETTLEMENTS + 1):
        await world.submit_job(ROWS, title=f"job {number}")
        for _ in range(50):
            if not world.leases_of(worker):
                break
            lease = world.leases_of(worker)[0]
            world.clock.now_ms += 700
            await world.commit(worker, lease)
    await world.engine.stop()
    return disk.records


def main() -> None:
    target = HERE / f"{sys.argv[1]}.journal"
    assert not target.exists(), f"{target} is recorded; choose a new name"
    # How devices come to be measured is another journal's story.
    vars(learning)["measured"] = lambda worker: True
    vars(learning)["speed_measured"] = lambda worker: 2_000
    stored = asyncio.run(record())
    records = list(decode_records(stored, 0, target))
    assert any(isinstance(one.event, TaskSettled) and one.event.worked_unit_micros for one in records)
    target.write_bytes(encode_segment(stored))
    target.with_suffix(".json").write_text(json.dumps(facts_of(records), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
